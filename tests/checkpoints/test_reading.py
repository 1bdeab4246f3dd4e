"""Files of weights as people have them: other projects' checkpoints, stand-ins, damage, any bytes."""

import io
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from repae_lite.checkpoints.models import (
    export_diffusers,
    load_discriminator,
    load_latent_stats,
    load_sit,
    load_vae,
    save_vae,
)
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.vae import AutoencoderKL, VAEConfig

STATS = LatentStats(torch.zeros(4), torch.ones(4))


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL.from_preset("tiny").eval()


def same(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


# ---------------------------------------------------------------- other projects' checkpoints

ONE = {"w": torch.zeros(1)}
BESIDE = {
    "vavae": (
        "",
        {**under("loss.", ONE), **under("foundation_model.blocks.0.", ONE), **under("linear_proj.", ONE)},
    ),
    "ldm": (
        "first_stage_model.",
        {
            **under("model.diffusion_model.", ONE),
            **under("cond_stage_model.", ONE),
            **under("model_ema.", {"encoderconv_inweight": torch.zeros(1), "decay": torch.zeros(())}),
            "betas": torch.zeros(3),
        },
    ),
    "gan": ("autoencoder.", {**under("discriminator.", ONE), **under("perceptual_loss.", ONE)}),
    "wrapped": ("module._orig_mod.vae.", {}),
}


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".bin", ".safetensors"])
@pytest.mark.parametrize(("prefix", "beside"), BESIDE.values(), ids=BESIDE)
def test_the_vae_in_a_training_checkpoint_is_loaded_and_the_rest_is_named(
    tmp_path, vae, caplog, prefix, beside, ending
):
    state, path = {**under(prefix, vae.state_dict()), **beside}, tmp_path / f"a b ü{ending}"
    if ending == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2"}, path)
    with caplog.at_level(logging.INFO):
        assert same(load_vae(path), vae)
    for name in beside:
        assert name.split(".")[0] in caplog.text
    assert ending == ".safetensors" or "left aside: epoch, pytorch-lightning_version" in caplog.text
    if "model_ema.decay" in beside:
        assert "not the averaged (EMA) but the plain vae" in caplog.text


def test_what_is_not_known_is_refused_by_name(tmp_path, vae):
    for prefix in ("", "first_stage_model."):
        torch.save(
            {"state_dict": under(prefix, vae.state_dict()) | {"strange.w": torch.zeros(1)}}, tmp_path / "x.pt"
        )
        with pytest.raises(
            ValueError, match=r"does not fit AutoencoderKL: strange\.w \[1\] instead of nothing"
        ):
            load_vae(tmp_path / "x.pt")
    two = under("vae.", vae.state_dict()) | under("autoencoder.", vae.state_dict())
    torch.save(two, tmp_path / "two.pt")
    with pytest.raises(
        ValueError, match=r"several networks that could be meant \(autoencoder\.\*, vae\.\*\)"
    ):
        load_vae(tmp_path / "two.pt")
    torch.save(under("module.", ONE) | ONE, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match="holds w twice, once as"):
        load_vae(tmp_path / "twice.pt")


def test_averages_and_other_names_of_the_weights(tmp_path, vae, caplog):
    with caplog.at_level(logging.INFO):
        torch.save(under("ema.", vae.state_dict()), tmp_path / "ema.pt")
        assert same(load_vae(tmp_path / "ema.pt"), vae) and "the averaged (EMA) vae" in caplog.text
    torch.save({"model": vae.state_dict(), "optimizer": {"a": 1}}, tmp_path / "model.pt")
    assert same(load_vae(tmp_path / "model.pt"), vae)
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8, layers=2).eval()
    state = vae.state_dict() | under("loss.discriminator.", discriminator.state_dict())
    torch.save({"state_dict": state}, tmp_path / "both.pt")
    assert same(load_discriminator(tmp_path / "both.pt"), discriminator)
    assert same(load_vae(tmp_path / "both.pt"), vae)


# ---------------------------------------------------------------- stand-ins, and files that cannot be read


@pytest.mark.parametrize("name", ["v.pt", "v.safetensors", "v.ckpt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "is a pointer of git-LFS"),
        (b"\n<!DOCTYPE html><html>", "is a web page that was saved in the place of the weights"),
    ],
)
def test_stand_ins_are_told(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_vae(tmp_path / name)


def test_what_the_system_does_not_let_us_read_is_not_called_damaged(tmp_path, vae, monkeypatch):
    path = tmp_path / "v.pt"
    torch.save(vae.state_dict(), path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched, pytest.raises(PermissionError, match="cannot be read"):
        patched.setattr("builtins.open", refuse)
        load_vae(path)
    with pytest.raises(ValueError, match="the source of the weights is empty"):
        load_vae("")
    with pytest.raises(OSError, match=r"cannot be read \(File name too long\)"):
        load_vae("x" * 5000)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no VAE: give a file"):
        load_vae(tmp_path / "empty")
    for name in ("config.json", "diffusion_pytorch_model.safetensors.index.json"):
        (tmp_path / "empty" / name).write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"its weights are split over the files that .*index\.json names"
    ):
        load_vae(tmp_path / "empty")


def test_a_disk_that_maps_no_files(tmp_path, vae, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("unable to mmap 9 bytes from file <v>: No such device (19)")

    def refuse_too(*_, **__):
        raise OSError("No such device (os error 19)")

    torch.save(vae.state_dict(), tmp_path / "v.pt")
    save_vae(tmp_path / "v.safetensors", vae, STATS)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    monkeypatch.setattr("repae_lite.utils.state_dicts.safe_open", refuse_too)
    assert same(load_vae(tmp_path / "v.pt"), vae) and same(load_vae(tmp_path / "v.safetensors"), vae)
    assert load_latent_stats(tmp_path / "v.safetensors").std.tolist() == [1.0] * 4


def test_unusual_but_whole_files_load(tmp_path, vae):
    state = vae.state_dict()
    name = "encoder.conv_in.weight"
    turned = state[name].transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    torch.save(state | {name: turned}, tmp_path / "turned.pt")
    assert same(load_vae(tmp_path / "turned.pt"), vae)
    save_file({key: value.bfloat16() for key, value in state.items()}, tmp_path / "half")
    (tmp_path / "half").chmod(0o444)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "half")
    assert torch.equal(
        load_vae(tmp_path / "link.safetensors").quant_conv.bias, state["quant_conv.bias"].bfloat16().float()
    )
    shutil.copy(tmp_path / "half", tmp_path / "half.bin")  # what it holds counts, not its ending
    assert load_vae(tmp_path / "half.bin").config == vae.config
    torch.save(state, tmp_path / "zip.safetensors")
    assert same(load_vae(tmp_path / "zip.safetensors"), vae)
    eight = {key: value.to(torch.float8_e4m3fn) for key, value in state.items()}
    save_file(eight, tmp_path / "eight.safetensors")
    assert torch.equal(
        load_vae(tmp_path / "eight.safetensors").quant_conv.bias, eight["quant_conv.bias"].float()
    )


def test_sizes_that_no_file_holds_are_refused_at_once(tmp_path, vae):
    wide = torch.zeros(1).expand(10_000_000, 12, 3, 3)
    torch.save(vae.state_dict() | {"encoder.conv_in.weight": wide}, tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"wide\.pt"):
        load_vae(tmp_path / "wide.pt")
    for config in ({"blocks": 10**9}, {"multipliers": [1] * 100_000}, {"width": 10**12}):
        save_file(vae.state_dict(), tmp_path / "v.safetensors", {"vae_config": json.dumps(config)})
        with pytest.raises(ValueError, match=r"v\.safetensors"):
            load_vae(tmp_path / "v.safetensors")
    for blob in ("1" * 5000, "[" * 5000, '{"latent_channels": ' + "9" * 400 + "}"):
        save_file(vae.state_dict(), tmp_path / "v.safetensors", {"vae_config": blob, "latents_scale": blob})
        for load in (load_vae, load_latent_stats):
            with pytest.raises(ValueError, match=r"v\.safetensors"):
                load(tmp_path / "v.safetensors")


# ---------------------------------------------------------------- runs


@pytest.fixture
def run(tmp_path, vae):
    for step in (100, 200, 300):
        save_vae(tmp_path / "run" / "checkpoints" / f"{step:07d}" / "vae.safetensors", vae, STATS)
    (tmp_path / "run" / "args.json").write_text("{}")
    return tmp_path / "run"


def test_a_damaged_checkpoint_names_the_last_whole_one(run, vae):
    files = [run / "checkpoints" / f"{step:07d}" / "vae.safetensors" for step in (100, 200, 300)]
    for file, whole in ((files[2], 200), (files[1], 100)):
        file.write_bytes(file.read_bytes()[:1000])
        for source in (run, files[2].parent, files[2]):
            with pytest.raises(
                ValueError, match=f"step {whole} is whole: give the run folder and --train-steps"
            ):
                load_vae(source)
    assert same(load_vae(run, step=100), vae)
    files[0].write_bytes(b"")
    with pytest.raises(ValueError, match="restore it from a copy; no other checkpoint of its run is whole"):
        load_vae(run)


def test_a_step_that_would_be_ignored_is_refused(run, tmp_path, vae):
    save_vae(tmp_path / "v.safetensors", vae, STATS)
    (tmp_path / "set").mkdir()
    torch.save(vae.state_dict(), tmp_path / "set" / "e2e.pt")
    for source in ("tiny", tmp_path / "v.safetensors", tmp_path / "set", run / "checkpoints" / "0000100"):
        for load in (load_vae, load_sit, load_discriminator, load_latent_stats):
            with pytest.raises(
                ValueError, match=r"--train-steps is 100, but .* is no run and has no checkpoints"
            ):
                load(source, step=100)


# ---------------------------------------------------------------- any bytes

SMALL = VAEConfig(width=4, multipliers=(1,), blocks=1, groups=2, mid_attention=False)
FEW = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def whole_files():
    torch.manual_seed(0)
    small, buffers = AutoencoderKL(SMALL), {}
    for kind, zipped in ((".pt", True), (".pth", False)):
        buffer = io.BytesIO()
        torch.save(small.state_dict(), buffer, _use_new_zipfile_serialization=zipped)
        buffers[kind] = buffer.getvalue()
    return {**buffers, ".safetensors": save(small.state_dict(), {"vae_config": '{"width": 4}'})}


WHOLE = whole_files()


def ends_well(load, path):
    """Success, or one sentence that names the file."""
    try:
        load(path)
    except (ValueError, OSError) as error:
        assert str(path.name) in str(error) and len(str(error).splitlines()) == 1, error


@pytest.mark.filterwarnings("ignore")
@FEW
@given(st.sampled_from([*WHOLE]), st.binary(max_size=300))
def test_any_bytes_end_well(tmp_path, kind, content):
    path = tmp_path / f"any{kind}"
    path.write_bytes(content)
    for load in (load_vae, load_latent_stats):
        ends_well(load, path)


@pytest.mark.filterwarnings("ignore")
@FEW
@given(st.data())
def test_cut_and_flipped_files_end_well(tmp_path, data):
    kind = data.draw(st.sampled_from([*WHOLE]))
    content, head = bytearray(WHOLE[kind]), data.draw(st.booleans())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 3000 if head else 10**9) - 1))] ^= data.draw(
            st.integers(1, 255)
        )
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path / f"hurt{kind}"
    path.write_bytes(content)
    ends_well(lambda file: load_vae(file, config=SMALL), path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    return export_diffusers(tmp_path_factory.mktemp("exported"), AutoencoderKL(SMALL), STATS)


@FEW
@given(data=st.data())
def test_any_configuration_of_diffusers_ends_well(exported, data):
    whole = json.loads((exported / "config.json").read_text())
    path = exported / "config.json"
    try:
        changed = whole | {data.draw(st.sampled_from(sorted(whole))): data.draw(JSON)}
        path.write_bytes(data.draw(st.just(json.dumps(changed).encode()) | st.binary(max_size=50)))
        for load in (load_vae, load_latent_stats):
            try:
                load(exported)
            except (ValueError, OSError) as error:
                assert str(exported) in str(error) and len(str(error).splitlines()) == 1
    finally:
        path.write_text(json.dumps(whole))


def test_the_whole_files_are_whole(tmp_path):
    for kind, content in WHOLE.items():
        (tmp_path / f"v{kind}").write_bytes(content)
        assert load_vae(Path(tmp_path / f"v{kind}"), config=SMALL).config == SMALL


# ---------------------------------------------------------------- small files that ask for much memory


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bytearray_of_any_size_is_not_made(tmp_path, zipped):
    class Asks:
        def __reduce__(self):
            return bytearray, (1 << 20,)

    path = tmp_path / "v.pt"
    torch.save({"a": Asks()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"v\.pt wants to run __builtin__\.bytearray"):
        load_vae(path)


def test_tensors_that_repeat_a_number_into_gigabytes_are_refused(tmp_path):
    wide = torch.ones(1).expand(1, 1 << 34, 1, 1)
    torch.save({"latents_scale": wide, "latents_bias": wide}, tmp_path / "s.pt")
    with pytest.raises(ValueError, match=r"s\.pt holds latents_scale of 68,719,476,736 bytes in 4 bytes"):
        load_latent_stats(tmp_path / "s.pt")
    with torch.device("meta"):
        large = AutoencoderKL.from_preset("f8d4").state_dict()
    torch.save({name: torch.zeros(1).expand(x.shape) for name, x in large.items()}, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=r"v\.pt has sizes of 334,615,452 bytes for"):
        load_vae(tmp_path / "v.pt")
