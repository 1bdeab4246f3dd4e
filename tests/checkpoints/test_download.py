"""`repae download` and loading by Hub id, against a stand-in of the Hub on this machine; breaks, kills and
refusals.
"""

import argparse
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_stand_in import COMMITS, HubStandIn
from huggingface_hub import constants

from repae_lite.checkpoints import hub
from repae_lite.checkpoints.models import (
    load_discriminator,
    load_latent_stats,
    load_sit,
    load_vae,
    save_sit,
    save_vae,
)
from repae_lite.checkpoints.released import RELEASED
from repae_lite.commands import download as download_command
from repae_lite.commands.main import main
from repae_lite.commands.presets import preset_names, read_preset
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL

ROOT = Path(__file__).resolve().parents[2]


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return AutoencoderKL.from_preset("tiny"), SiT.from_preset("tiny"), PatchDiscriminator(width=8, layers=2)


@pytest.fixture(scope="module")
def repositories(networks):
    vae, sit, discriminator = networks
    vae_set = {
        "README.md": b"# a card",
        "x-400k.pt": saved(vae.state_dict()),
        "x-400k-latents-stats.pt": saved(
            {"latents_scale": torch.full((1, 4, 1, 1), 2.0), "latents_bias": torch.zeros(1, 4, 1, 1)}
        ),
        "x-400k-discriminator-ckpt.pt": saved(discriminator.state_dict()),
    }
    run = {
        "model": sit.state_dict(),
        "ema": sit.state_dict(),
        "args": argparse.Namespace(model="tiny"),
        "steps": 400000,
    }
    return {
        "REPA-E/e2e-vavae": vae_set,
        "REPA-E/vavae": {**vae_set, "x-100k.pt": b"another"},
        "REPA-E/sdvae": {
            "a.pt": os.urandom(5000),
            "a-latents-stats.pt": os.urandom(3000),
            "a-discriminator-ckpt.pt": os.urandom(900),
        },
        "REPA-E/invae": {"README.md": b"nothing yet"},
        "REPA-E/sit-repae-sdvae": {
            "args.json": b'{"model": "tiny"}',
            "checkpoints/0100000.pt": b"early",
            "checkpoints/0400000.pt": saved(run),
            "samples/0.png": b"png",
        },
        "REPA-E/e2e-vavae-hf": {
            "config.json": b"{}",
            "diffusion_pytorch_model.safetensors": b"weights",
            "other.bin": b"x",
        },
    }


@pytest.fixture
def stand_in(repositories, tmp_path, monkeypatch):
    """The stand-in in the Hub's place, an empty cache, and a client that is online."""
    server = HubStandIn({name: dict(files) for name, files in repositories.items()})
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512, raising=False)
    for name in ("close_session", "reset_sessions"):  # a client that was made offline would stay so
        getattr(huggingface_hub, name, getattr(huggingface_hub.utils, name, lambda: None))()
    yield server
    server.close()


def refused(capsys, *arguments):
    """Runs the command, which must refuse in one sentence; returns it."""
    capsys.readouterr()
    assert main(["download", *map(str, arguments)]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("repae download: ") and "Traceback" not in "".join(err)
    return err[-1].removeprefix("repae download: ")


def visible(folder):
    """Files that a user sees."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("[!.]*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_released_names_and_presets_agree():
    assert {name for preset in preset_names() for name in read_preset(preset).released} <= set(RELEASED)


def test_sets_are_picked_and_laid_out(stand_in, repositories, tmp_path, capsys):
    assert (
        main(
            ["download", "e2e-vavae", "sit-repae-sdvae", "e2e-vavae-hf", "--output-dir", str(tmp_path / "p")]
        )
        == 0
    )
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and f"REPA-E/e2e-vavae@{COMMITS['main']}" in printed[0]
    expected = {
        "e2e-vavae": {"x-400k.pt", "x-400k-latents-stats.pt", "x-400k-discriminator-ckpt.pt"},
        "sit-repae-sdvae": {"args.json", "checkpoints/0400000.pt"},
        "e2e-vavae-hf": {"config.json", "diffusion_pytorch_model.safetensors"},
    }
    for name, files in expected.items():
        assert visible(tmp_path / "p" / name) == files
        for file in files:
            assert (tmp_path / "p" / name / file).read_bytes() == repositories[f"REPA-E/{name}"][file]
    assert load_vae(tmp_path / "p" / "e2e-vavae").config.latent_channels == 4
    assert load_latent_stats(tmp_path / "p" / "e2e-vavae").std.tolist() == [0.5] * 4
    assert load_sit(tmp_path / "p" / "sit-repae-sdvae").config.depth == 6


def test_what_a_preset_starts_from(stand_in, tmp_path, capsys):
    assert main(["download", "all-for", "repae-sdvae", "--output-dir", str(tmp_path)]) == 0
    assert visible(tmp_path / "sdvae") == {"a.pt", "a-latents-stats.pt", "a-discriminator-ckpt.pt"}
    known = ", ".join(preset_names())
    assert f"names no preset: give all-for and one of {known}" in refused(capsys, "all-for", "nothing")
    assert main(["download", "all-for", "rec-e2e-vavae", "--output-dir", str(tmp_path)]) == 0
    assert (tmp_path / "e2e-vavae").is_dir()  # a row that trains nothing
    assert "dit-sdvae is not built" in refused(capsys, "all-for", "dit-sdvae")
    assert "tiny starts from nothing released" in refused(capsys, "all-for", "tiny")


def test_data_sets_and_released_sets_in_one_command(stand_in, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(download_command, "fetch_data_set", lambda *which: fetched.append(which))
    names = ["sdvae", "data:embedded", "e2e-vavae@v1"]
    assert main(["download", *names, "--output-dir", str(tmp_path)]) == 0
    assert fetched == [("embedded", str(tmp_path))]
    assert {path.name for path in tmp_path.iterdir()} >= {"sdvae", "e2e-vavae"}


def test_a_step_of_what_is_no_run_is_refused(stand_in, tmp_path, capsys):
    for names in (["e2e-vavae"], ["sit-repae-sdvae", "e2e-vavae@v1"], ["all-for", "repae-sdvae"]):
        sentence = refused(capsys, *names, "--train-steps", 100000, "--output-dir", tmp_path)
        assert "--train-steps is 100000, but" in sentence and "is no run" in sentence
    assert not stand_in.requests


def test_a_second_run_fetches_only_what_changed(stand_in, tmp_path):
    arguments = ["download", "sdvae", "--output-dir", str(tmp_path)]
    assert main(arguments) == 0
    assert sorted(stand_in.fetched()) == ["a-discriminator-ckpt.pt", "a-latents-stats.pt", "a.pt"]
    (tmp_path / "sdvae" / "a.pt").unlink()
    stand_in.requests.clear()
    assert main(arguments) == 0
    assert stand_in.fetched() == ["a.pt"]


def test_a_file_that_was_cut_later_is_mended(stand_in, repositories, tmp_path, capsys, monkeypatch):
    arguments = ["download", "sdvae", "--output-dir", str(tmp_path)]
    assert main(arguments) == 0
    path, data = tmp_path / "sdvae" / "a.pt", repositories["REPA-E/sdvae"]["a.pt"]

    def cut():
        times = path.stat()
        path.write_bytes(data[:100])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        stand_in.requests.clear()

    cut()
    assert main(arguments) == 0
    assert path.read_bytes() == data and stand_in.fetched() == ["a.pt"]
    cut()
    stand_in.sizes["a.pt"] = 4999  # what the listing says
    sentence = refused(capsys, "sdvae", "--output-dir", tmp_path)
    assert "a.pt has 5,000 bytes where REPA-E/sdvae lists 4,999: delete it" in sentence
    stand_in.sizes["a.pt"] = 0  # it says nothing
    assert main(arguments) == 0
    del stand_in.sizes["a.pt"]
    cut()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    stand_in.down.add("a.pt")
    sentence = refused(capsys, "sdvae", "--output-dir", tmp_path)
    assert "the Hub answers a.pt of REPA-E/sdvae@11111111 with an error (" in sentence and "500" in sentence


def test_a_revision_is_kept_to(stand_in, tmp_path, capsys):
    assert main(["download", "sdvae@v1", "--output-dir", str(tmp_path)]) == 0
    assert COMMITS["v1"] in capsys.readouterr().out
    assert all(
        f"/resolve/{COMMITS['v1']}/" in path for _, path, _ in stand_in.requests if "/resolve/" in path
    )
    assert main(["download", "sdvae", "--revision", COMMITS["v1"], "--output-dir", str(tmp_path)]) == 0
    assert "has no revision 'v9'" in refused(capsys, "sdvae@v9", "--output-dir", tmp_path)


def test_listing_fetches_nothing(stand_in, tmp_path, capsys):
    assert main(["download", "vavae", "--list", "--output-dir", str(tmp_path / "p")]) == 0
    assert "x-100k.pt" in capsys.readouterr().out and not stand_in.fetched() and not (tmp_path / "p").exists()


def test_several_files_that_could_be_meant(stand_in, tmp_path, capsys):
    sentence = refused(capsys, "vavae", "--output-dir", tmp_path)
    assert "several files that could be meant (x-100k.pt, x-400k.pt): choose by --include PATTERN" in sentence
    assert main(["download", "vavae", "--include", "*400k*", "--output-dir", str(tmp_path)]) == 0
    assert "x-400k.pt" in visible(tmp_path / "vavae") and "x-100k.pt" not in visible(tmp_path / "vavae")
    assert (
        main(["download", "sit-repae-sdvae", "--train-steps", "100000", "--output-dir", str(tmp_path)]) == 0
    )
    assert "checkpoints/0100000.pt" in visible(tmp_path / "sit-repae-sdvae")


@pytest.mark.parametrize("name", ["sit-repae-sdvae", "vavae", "e2e-vavae-hf"])
def test_a_pattern_that_nothing_matches(stand_in, tmp_path, capsys, name):
    sentence = refused(capsys, name, "--include", "*500k*", "--output-dir", tmp_path)
    assert "(it has " in sentence and "give another pattern than --include '*500k*'" in sentence
    assert sorted(stand_in.repositories[f"REPA-E/{name}"])[0] in sentence


def test_a_file_in_the_place_of_the_folder(stand_in, tmp_path, capsys):
    (tmp_path / "file").touch()
    sentence = refused(capsys, "sdvae", "--output-dir", tmp_path / "file")
    assert (
        f"cannot write in {tmp_path / 'file' / 'sdvae'} (Not a directory): choose another" in sentence
        and "Errno" not in sentence
    )


def test_an_endpoint_that_is_no_address(stand_in, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "nonsense")
    sentence = refused(capsys, "sdvae", "--output-dir", tmp_path)
    assert "HF_ENDPOINT is 'nonsense': unset it, or set it to an address with http://" in sentence


def test_names_with_a_backslash_are_skipped(stand_in, tmp_path):
    stand_in.repositories["REPA-E/sdvae"]["..\\b.pt"] = b"elsewhere"
    assert main(["download", "sdvae", "--output-dir", str(tmp_path)]) == 0
    assert visible(tmp_path / "sdvae") == {"a.pt", "a-latents-stats.pt", "a-discriminator-ckpt.pt"}


def test_what_is_not_there_is_one_sentence(stand_in, tmp_path, capsys):
    assert "unknown released set 'sd-vae': choose among sdvae, invae" in refused(capsys, "sd-vae")
    assert "REPA-E/invae on the Hub (it has README.md) holds no VAE" in refused(
        capsys, "invae", "--output-dir", tmp_path
    )
    assert "there is no repository REPA-E/e2e-invae" in refused(capsys, "e2e-invae", "--output-dir", tmp_path)
    sentence = refused(capsys, "sit-repae-sdvae", "--train-steps", 7, "--output-dir", tmp_path)
    assert "no checkpoint at step 7: choose one of 100000, 400000" in sentence
    stand_in.gated.add("REPA-E/sdvae")
    assert "REPA-E/sdvae wants its terms accepted" in refused(capsys, "sdvae", "--output-dir", tmp_path)
    assert not visible(tmp_path)


def test_offline_and_unreachable_are_one_sentence(stand_in, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "the Hub cannot be reached (offline)" in refused(capsys, "sdvae", "--output-dir", tmp_path)
    stand_in.close()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert "the connection to the Hub broke off at REPA-E/sdvae" in refused(
        capsys, "sdvae", "--output-dir", tmp_path
    )


def test_a_disk_that_is_too_small_is_refused_at_once(stand_in, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    assert "REPA-E/sdvae needs 0.0 GB more in" in refused(capsys, "sdvae", "--output-dir", tmp_path)
    assert not stand_in.fetched()


def test_a_broken_connection_is_taken_up_where_it_broke(stand_in, repositories, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client waits before it tries again
    stand_in.breaks["a.pt"] = [2048, None]
    assert main(["download", "sdvae", "--output-dir", str(tmp_path)]) == 0
    ranges = [span for method, path, span in stand_in.requests if method == "GET" and path.endswith("/a.pt")]
    assert ranges == [None, "bytes=2048-"]
    assert (tmp_path / "sdvae" / "a.pt").read_bytes() == repositories["REPA-E/sdvae"]["a.pt"]


def test_a_connection_that_stays_broken_keeps_what_is_whole(
    stand_in, repositories, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    stand_in.breaks["a-latents-stats.pt"] = [0]
    sentence = refused(capsys, "sdvae", "--output-dir", tmp_path)
    assert "the connection to the Hub broke off" in sentence and "finished files are kept" in sentence
    assert visible(tmp_path / "sdvae") == {"a.pt"}
    stand_in.breaks.clear()
    stand_in.requests.clear()
    assert main(["download", "sdvae", "--output-dir", str(tmp_path)]) == 0
    assert "a.pt" not in stand_in.fetched()
    for name, data in repositories["REPA-E/sdvae"].items():
        assert (tmp_path / "sdvae" / name).read_bytes() == data


def test_a_killed_download_leaves_nothing_half_done(stand_in, repositories, tmp_path):
    """In a process of its own, which also takes the address from the environment."""
    stand_in.stalls.add("a-latents-stats.pt")
    environment = {
        **os.environ,
        "HF_ENDPOINT": stand_in.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-m", "repae_lite", "download", "sdvae", "--output-dir", str(tmp_path / "p")]
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    until = time.monotonic() + 120
    while (
        "a-latents-stats.pt" not in stand_in.fetched() and child.poll() is None and time.monotonic() < until
    ):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    text, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, text
    assert visible(tmp_path / "p" / "sdvae") == {"a.pt"}
    stand_in.stalls.clear()
    assert main(["download", "sdvae", "--output-dir", str(tmp_path / "p")]) == 0
    for name, data in repositories["REPA-E/sdvae"].items():
        assert (tmp_path / "p" / "sdvae" / name).read_bytes() == data


# ---------------------------------------------------------------- loading by Hub id


def test_models_load_by_their_hub_id_and_later_offline(stand_in, networks, monkeypatch):
    vae = load_vae("REPA-E/e2e-vavae")
    stats = load_latent_stats("REPA-E/e2e-vavae")
    assert stats.std.tolist() == [0.5] * 4 and "README.md" not in stand_in.fetched()
    sit = load_sit("REPA-E/sit-repae-sdvae")
    assert torch.equal(sit.blocks[0].attn.qkv.weight, networks[1].blocks[0].attn.qkv.weight)
    assert load_discriminator("REPA-E/e2e-vavae").main[0].weight.shape[0] == 8
    load_vae("REPA-E/e2e-vavae@v1")
    assert any(
        f"/resolve/{revision}/" in path
        for _, path, _ in stand_in.requests
        for revision in ("v1", COMMITS["v1"])
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    stand_in.requests.clear()
    again = load_vae("REPA-E/e2e-vavae")
    for loaded in (vae, again):
        assert torch.equal(loaded.quant_conv.weight, networks[0].quant_conv.weight)
    assert not stand_in.requests
    with pytest.raises(
        ConnectionError, match=r"REPA-E/never-seen is not in the cache, .*; the Hub cannot be reached"
    ):
        load_vae("REPA-E/never-seen")


def test_what_is_loaded_is_of_the_commit_that_was_listed(stand_in, tmp_path):
    load_vae("REPA-E/e2e-vavae")
    assert {
        path.split("/resolve/")[1].split("/")[0] for _, path, _ in stand_in.requests if "/resolve/" in path
    } == {COMMITS["main"]}
    load_vae("REPA-E/e2e-vavae@v1")
    refs = tmp_path / "hub" / "models--REPA-E--e2e-vavae" / "refs"
    assert {
        path.name: path.read_text() for path in refs.iterdir()
    } == COMMITS  # so that the cache knows the names


def test_without_a_connection_the_cache_is_taken(stand_in, networks, monkeypatch):
    load_vae("REPA-E/e2e-vavae")
    load_vae("REPA-E/e2e-vavae@v1")
    stand_in.close()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for name in ("REPA-E/e2e-vavae", "REPA-E/e2e-vavae@v1", f"REPA-E/e2e-vavae@{COMMITS['v1']}"):
        with pytest.warns(UserWarning, match=f"the Hub does not answer, so {name} is taken from the cache"):
            assert torch.equal(load_vae(name).quant_conv.weight, networks[0].quant_conv.weight)
    for name in ("REPA-E/never-seen", "REPA-E/e2e-vavae@v2"):
        with pytest.raises(
            ConnectionError,
            match=f"{name} is not in the cache, .*; the connection to the Hub broke off",
        ):
            load_vae(name)


def test_offline_a_file_that_is_not_cached_is_not_said_to_be_missing(stand_in, monkeypatch):
    load_vae("REPA-E/e2e-vavae")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError,
        match="REPA-E/e2e-vavae is not in the cache, or not all of it; the Hub cannot",
    ):
        load_discriminator("REPA-E/e2e-vavae")


def test_a_run_of_ours_loads_by_its_hub_id(stand_in, networks, tmp_path, monkeypatch):
    vae, sit, _ = networks
    for step in (5, 10):
        folder = tmp_path / "run" / "checkpoints" / f"{step:07d}"
        save_vae(folder / "vae.safetensors", vae, LatentStats(torch.zeros(4), torch.ones(4)))
        save_sit(folder / "ema.safetensors", sit)
        (folder / "resume.pt").write_bytes(b"moments")
    (tmp_path / "run" / "checkpoints" / "0000010.pt").write_bytes(b"the same in one file")
    files = (path for path in (tmp_path / "run").rglob("*") if path.is_file())
    stand_in.repositories["me/run"] = {
        path.relative_to(tmp_path / "run").as_posix(): path.read_bytes() for path in files
    }
    stand_in.repositories["REPA-E/sit-repae-sdvae"] = stand_in.repositories["me/run"]
    assert torch.equal(load_vae("me/run").quant_conv.weight, vae.quant_conv.weight)
    assert set(stand_in.fetched()) == {"vae.safetensors"}  # and no other network's weights
    assert load_sit("me/run").config == sit.config
    with pytest.raises(
        FileNotFoundError,
        match="checkpoints/0000010 of me/run on the Hub holds no discriminator: a run with",
    ):
        load_discriminator("me/run")
    assert all("/checkpoints/0000010/" in path for _, path, _ in stand_in.requests if "/resolve/" in path)
    assert "resume.pt" not in stand_in.fetched()
    stand_in.requests.clear()
    load_vae("me/run", step=5)
    assert any("/checkpoints/0000005/" in path for _, path, _ in stand_in.requests)
    assert (
        main(["download", "sit-repae-sdvae", "--train-steps", "5", "--output-dir", str(tmp_path / "p")]) == 0
    )
    names = ("vae.safetensors", "ema.safetensors", "resume.pt")
    assert visible(tmp_path / "p" / "sit-repae-sdvae") == {f"checkpoints/0000005/{name}" for name in names}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load_vae("me/run").quant_conv.weight, vae.quant_conv.weight)
    with pytest.raises(ConnectionError, match="is not in the cache"):
        load_discriminator("me/run")


def test_hub_ids_that_are_none(stand_in, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no repository nobody/nothing"):
        load_vae("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="on the Hub holds no discriminator"):
        load_discriminator("REPA-E/e2e-vavae-hf")
    stand_in.requests.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for source in ("runs/typo", "a/b/c", "weights/vae.pt", tmp_path / "x"):  # paths, so nobody is asked
        with pytest.raises(FileNotFoundError, match="do not exist: check the path"):
            load_vae(source)
    assert not stand_in.requests


def test_a_revision_leads_into_no_other_folder():
    assert hub.parse_hub_id("me/it@refs/pr/3") == ("me/it", "refs/pr/3")
    for text in ("me/it@../../x", "me/it@/etc/x", "me/it@v1/../x"):
        assert hub.parse_hub_id(text) is None
