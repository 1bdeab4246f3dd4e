"""Why a download failed: each known cause in its own sentence, anything else in the library's words."""

import errno
import http.client
import os
import socket
import ssl
import urllib.error

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, LocalTokenNotFoundError

from repae_lite.method.losses import LPIPSLoss
from repae_lite.utils.downloads import fetching, torch_hub_file


def caused(error, cause):
    error.__cause__ = cause
    return error


def http_error(code, headers=None):
    return urllib.error.HTTPError("https://x/y", code, "words", headers or {}, None)


REFUSED = OSError(errno.ECONNREFUSED, "Connection refused")
EXPIRED = ssl.SSLCertVerificationError(1, "certificate has expired")
ProxyError = type("ProxyError", (Exception,), {"__module__": "httpx"})
ReadTimeout = type("ReadTimeout", (Exception,), {"__module__": "requests.exceptions"})
PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


@pytest.mark.parametrize(
    ("error", "becomes", "words"),
    [
        (
            RuntimeError("CAS service error"),
            ConnectionError,
            "(RuntimeError: CAS service error): give the same",
        ),
        (RuntimeError("x"), ConnectionError, "set HF_HUB_DISABLE_XET=1"),
        (PanicException("a lock"), ConnectionError, "(PanicException: a lock)"),
        (ValueError("Unknown scheme for proxy URL"), ConnectionError, "Unknown scheme for proxy URL"),
        (REFUSED, ConnectionError, "the connection to the Hub broke off"),
        (caused(LocalEntryNotFoundError("no"), REFUSED), ConnectionError, "broke off at me/it ([Errno"),
        (LocalEntryNotFoundError("no"), ConnectionError, "the Hub cannot be reached (offline): connect"),
        (LocalTokenNotFoundError("no"), ValueError, "nobody is logged in"),
        (ReadTimeout("slow"), ConnectionError, "broke off at me/it (slow)"),
        (http.client.IncompleteRead(b"12", 9), ConnectionError, "broke off at me/it (IncompleteRead"),
        (socket.gaierror(-2, "Name or service not known"), ConnectionError, "Name or service not known"),
        (urllib.error.URLError(TimeoutError("timed out")), ConnectionError, "timed out"),
        (urllib.error.URLError(EXPIRED), ConnectionError, "certificate is refused at me/it"),
        (
            caused(ReadTimeout("x"), EXPIRED),
            ConnectionError,
            "name your network's certificates in SSL_CERT_FILE",
        ),
        (ProxyError("407"), ConnectionError, "check HTTPS_PROXY"),
        (http_error(401), ValueError, "refuses access to me/it (401): log in"),
        (http_error(416), ConnectionError, "remove its *.incomplete files"),
        (http_error(429, {"Retry-After": "30"}), ConnectionError, "wait 30 seconds, then give the same"),
        (
            http_error(503),
            ConnectionError,
            "answers me/it with an error (HTTP Error 503: words): try again later",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            OSError,
            "the cache in HF_HOME cannot be used (No space",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/c/x.lock"),
            OSError,
            "/c/x.lock cannot be used",
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            OSError,
            "set HF_HOME to a folder that can be written",
        ),
    ],
)
def test_each_cause_has_its_sentence(error, becomes, words):
    with pytest.raises(becomes) as refusal, fetching("me/it", remedy="give a file"):
        raise error
    sentence = str(refusal.value)
    assert words in sentence and sentence.endswith(", or give a file") and "\n" not in sentence
    assert isinstance(refusal.value, ConnectionError) == (becomes is ConnectionError)


def test_bugs_and_interruptions_pass():
    for error in (TypeError("a bug"), AttributeError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)), fetching("me/it"):
            raise error


# ---------------------------------------------------------------- the VGG-16 network of LPIPS


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (urllib.error.URLError(socket.gaierror(-3, "Temporary failure")), "broke off at the VGG-16"),
        (http_error(403), "the server refuses access to the VGG-16"),
        (RuntimeError('invalid hash value (expected "397923af", got "00")'), "invalid hash value"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "the cache in TORCH_HOME cannot be used (No space left",
        ),
    ],
)
def test_the_trunk_of_lpips_that_cannot_be_fetched(home, monkeypatch, error, words):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises((OSError, ValueError), match="or take --perceptual tiny") as refusal:
        LPIPSLoss()
    assert words in str(refusal.value) and "HF_HOME" not in str(refusal.value)


def test_a_trunk_that_is_not_whole_is_named(home):
    home.parent.mkdir(parents=True)
    for content in (b"\xad" * 5000, b"", b"\x80\x02}q\x00."):
        home.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"vgg16-397923af\.pth is not .*: remove \S+, and it is downloaded again"
        ):
            LPIPSLoss()


def test_a_whole_trunk_is_filled_in(home):
    torch.manual_seed(0)
    blank = LPIPSLoss(pretrained_trunk=False).net.net.state_dict()
    state = {f"features.{name.split('.', 1)[1]}": torch.randn_like(tensor) for name, tensor in blank.items()}
    home.parent.mkdir(parents=True)
    torch.save(state | {"classifier.0.bias": torch.zeros(3)}, home, _use_new_zipfile_serialization=False)
    loss = LPIPSLoss()
    for name, tensor in loss.net.net.state_dict().items():
        assert torch.equal(tensor, state[f"features.{name.split('.', 1)[1]}"])
    assert torch.equal(loss.net.lin0.model[1].weight, loss.net.lins[0].model[1].weight)
    assert (loss.net.lin0.model[1].weight >= 0).all()  # as trained, not as drawn


def test_a_file_of_the_cache_is_not_fetched_again(home, monkeypatch):
    home.parent.mkdir(parents=True)
    home.write_bytes(b"x")
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    assert torch_hub_file("https://x/vgg16-397923af.pth", "it", "look") == home
