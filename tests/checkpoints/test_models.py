"""Models come back the same from every layout, or are refused whole; diffusers reads its exports."""

import argparse
import json
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from repae_lite.checkpoints import infer
from repae_lite.checkpoints.find import SHIPPED
from repae_lite.checkpoints.models import (
    export_diffusers,
    load_discriminator,
    load_latent_stats,
    load_sit,
    load_vae,
    save_sit,
    save_vae,
)
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.sit import SIT_PRESETS, SiT, SiTConfig
from repae_lite.networks.vae import VAE_PRESETS, AutoencoderKL, VAEConfig
from repae_lite.utils.state_dicts import save_weights

STATE_DICTS = Path(__file__).parents[1] / "reference" / "state_dicts"
SHALLOW = SiTConfig(
    in_channels=4,
    input_size=4,
    patch_size=2,
    width=16,
    depth=2,
    heads=2,
    num_classes=3,
    target_dims=(6, 5),
    alignment_depth=1,
    projector_width=8,
)

SMALL = {
    "attention at the bottom": VAEConfig(width=16, multipliers=(1, 2), blocks=1, groups=4),
    "attention in levels": VAEConfig(
        latent_channels=6, width=8, multipliers=(1, 1, 2), blocks=2, groups=4, attention_levels=(1, 2)
    ),
    "no attention": VAEConfig(width=8, multipliers=(1, 3), blocks=1, groups=4, mid_attention=False),
}


def random_vae(config):
    """A VAE with seeded random weights, away from their initial zeros and ones."""
    torch.manual_seed(0)
    vae = AutoencoderKL(config).eval()
    for p in vae.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return vae


def test_the_convolutional_projector_is_told_by_shapes(tmp_path):
    sit = SiT.from_preset("tiny", projector="conv", target_dims=(6, 5))
    fields = infer.sit_fields(sit.state_dict(), "it")
    assert (
        fields["projector"] == "conv" and fields["target_dims"] == (6, 5) and "projector_width" not in fields
    )
    save_sit(tmp_path / "sit.safetensors", sit)
    assert load_sit(tmp_path / "sit.safetensors").config == sit.config
    torch.save(sit.state_dict(), tmp_path / "sit.pt")
    assert load_sit(tmp_path / "sit.pt").config == sit.config


def test_a_saved_vae_comes_back_the_same(tmp_path):
    vae = random_vae(SMALL["attention at the bottom"])
    stats = LatentStats(torch.randn(4), torch.rand(4) + 0.5)
    save_vae(tmp_path / "vae.safetensors", vae, stats)
    loaded = load_vae(tmp_path / "vae.safetensors")
    assert loaded.config == vae.config and not loaded.training
    for (name, a), b in zip(vae.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    found = load_latent_stats(tmp_path / "vae.safetensors")
    assert torch.equal(found.mean, stats.mean) and torch.equal(found.std, stats.std)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_vaes_load_with_their_statistics(name):
    vae = load_vae(name)
    stats = load_latent_stats(name)
    assert vae.config.latent_channels == len(stats.mean) == len(stats.std) and bool((stats.std > 0).all())


@pytest.mark.parametrize("name", [name for name, files in SHIPPED.items() if "sit" in files])
def test_shipped_sits_load_beside_their_vaes(name):
    sit, stats = load_sit(name), load_latent_stats(name)
    assert sit.config.num_classes == 10 and {p.dtype for p in sit.parameters()} == {torch.float32}
    torch.testing.assert_close(sit.latent_stats().std, stats.std, rtol=0.02, atol=0)


def test_a_name_without_a_sit_is_refused_with_those_that_have_one():
    with pytest.raises(FileNotFoundError, match=r"no SiT ships under the name tiny-e2e: .*tiny-e2e-20k"):
        load_sit("tiny-e2e")


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_diffusers_loads_an_export_and_reconstructs_the_same(tmp_path, config):
    diffusers = pytest.importorskip("diffusers")
    vae = random_vae(config)
    channels = config.latent_channels
    stats = LatentStats(torch.randn(channels), torch.rand(channels) + 0.5)
    folder = export_diffusers(tmp_path / "exported", vae, stats)
    theirs, info = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        ours, posterior = vae.encode(x), theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.mean, ours.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(posterior.std, ours.std, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.decode(ours.mean).sample, vae.decode(ours.mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(theirs.config.latents_std), stats.std)
    torch.testing.assert_close(torch.tensor(theirs.config.latents_mean), stats.mean)


def test_export_writes_two_files_and_replaces_them(tmp_path):
    vae = random_vae(SMALL["no attention"])
    for _ in range(2):
        export_diffusers(tmp_path, vae, LatentStats(torch.zeros(4), torch.ones(4)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["block_out_channels"] == [8, 24]


def test_a_folding_vae_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match=r"folds 2x2 pixels .* which diffusers cannot"):
        export_diffusers(
            tmp_path / "folded", AutoencoderKL.from_preset("tiny"), LatentStats(torch.zeros(4), torch.ones(4))
        )
    assert not (tmp_path / "folded").exists()


# ---------------------------------------------------------------- every layout


def same(a, b):
    """Two modules have the same weights."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


def small_sit(seed=0, **changes):
    """A SiT of the embedded scale's width and depth, whose heads its shapes tell, with other statistics than
    at the start.
    """
    torch.manual_seed(seed)
    sit = SiT.from_preset("tiny", **changes).eval()
    for tensor in sit.state_dict().values():
        tensor += 0.05 * torch.rand_like(tensor) if tensor.is_floating_point() else 7
    return sit


@pytest.fixture
def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKL.from_preset("tiny").eval()


@pytest.fixture
def official(tmp_path, tiny_vae):
    """An official run folder, its parts, and the options in its checkpoint."""
    torch.manual_seed(1)
    parts = {
        "model": small_sit(1),
        "ema": small_sit(2),
        "vae": tiny_vae,
        "discriminator": PatchDiscriminator(width=8, layers=2).eval(),
    }
    options = argparse.Namespace(
        model="tiny", encoder_depth=3, bn_momentum=0.2, num_classes=10, vae="tiny", resolution=32
    )
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    content = {name: part.state_dict() for name, part in parts.items()}
    adam = torch.optim.AdamW(tiny_vae.parameters()).state_dict()
    content |= {"opt": adam, "opt_vae": adam, "opt_disc": adam, "args": options, "steps": 400}
    torch.save(content, run / "checkpoints" / "0000400.pt")
    torch.save(
        content | {"vae": AutoencoderKL.from_preset("tiny").state_dict()}, run / "checkpoints" / "0000200.pt"
    )
    (run / "args.json").write_text(json.dumps(vars(options)))
    return run, parts


@pytest.mark.parametrize("where", [".", "checkpoints/0000400.pt"])
def test_an_official_run_gives_all_its_parts(official, where):
    run, parts = official
    source = run / where
    assert same(load_vae(source), parts["vae"]) and load_vae(source).config == VAE_PRESETS["tiny"]
    assert same(load_discriminator(source), parts["discriminator"])
    assert same(load_sit(source), parts["ema"]) and same(load_sit(str(source), ema=False), parts["model"])
    config = load_sit(source).config
    assert (config.alignment_depth, config.bn_momentum, config.heads, config.num_classes) == (3, 0.2, 4, 10)
    for ema, name in ((True, "ema"), (False, "model")):
        stats, bn = load_latent_stats(source, ema=ema), parts[name].bn
        assert torch.equal(1 / stats.std, 1 / bn.running_var.sqrt())
        assert torch.equal(stats.mean, bn.running_mean)


def test_a_step_of_a_run_is_chosen_or_named(official):
    run, parts = official
    assert not same(load_vae(run, step=200), parts["vae"])
    with pytest.raises(FileNotFoundError, match="no checkpoint at step 300: choose one of 200, 400"):
        load_vae(run, step=300)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="has no checkpoints yet"):
        load_sit(run)


def test_our_run_gives_all_its_parts(official, tmp_path):
    _, parts = official
    folder = tmp_path / "ours" / "checkpoints" / "0000500"
    save_vae(folder / "vae.safetensors", parts["vae"], LatentStats(torch.zeros(4), torch.ones(4)))
    save_sit(folder / "sit.safetensors", parts["model"])
    save_weights(
        folder / "ema.safetensors", parts["ema"]
    )  # without its sizes, which args.json and the shapes tell
    save_weights(folder / "discriminator.safetensors", parts["discriminator"])
    (tmp_path / "ours" / "args.json").write_text(json.dumps({"model": "tiny", "encoder_depth": 4}))
    (tmp_path / "ours" / "checkpoints" / ".0000600.1.partial").mkdir()  # of a killed run
    for source in (tmp_path / "ours", folder):
        assert same(load_vae(source), parts["vae"]) and same(
            load_discriminator(source), parts["discriminator"]
        )
        assert same(load_sit(source), parts["ema"]) and same(load_sit(source, ema=False), parts["model"])
        assert (
            load_sit(source).config.alignment_depth == 4
            and load_sit(source, ema=False).config == parts["model"].config
        )
        assert torch.equal(load_latent_stats(source).mean, parts["ema"].bn.running_mean)
    for name in ("sit", "ema"):  # as after train-vae: the statistics are the VAE's own
        (folder / f"{name}.safetensors").unlink()
    assert load_latent_stats(folder).std.tolist() == [1.0] * 4
    (folder / "vae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"0000500 of .* holds no VAE: a run with a frozen VAE keeps"):
        load_vae(tmp_path / "ours")


def test_a_released_set_is_picked_by_its_names(tmp_path, tiny_vae):
    torch.manual_seed(0)
    disc, scale = PatchDiscriminator(), torch.rand(4) + 0.5
    folder = tmp_path / "e2e"
    folder.mkdir()
    torch.save(tiny_vae.state_dict(), folder / "e2e-400k.pt")
    torch.save(disc.state_dict(), folder / "e2e-400k-discriminator-ckpt.pt")
    stats = {"latents_scale": scale.view(1, 4, 1, 1), "latents_bias": -scale.view(1, 4, 1, 1)}
    torch.save(stats, folder / "e2e-400k-latents-stats.pt")
    for source in (folder, folder / "e2e-400k.pt"):
        assert same(load_vae(source), tiny_vae)
        found = load_latent_stats(source)
        assert torch.equal(found.std, 1 / scale) and torch.equal(found.mean, -scale)
    assert same(load_discriminator(folder), disc)
    assert torch.equal(load_latent_stats(folder / "e2e-400k-latents-stats.pt").std, 1 / scale)
    torch.save(tiny_vae.state_dict(), folder / "e2e-100k.pt")
    with pytest.raises(
        ValueError, match=r"several files that could be meant \(e2e-100k\.pt, e2e-400k\.pt\): name one"
    ):
        load_vae(folder)
    with pytest.raises(
        ValueError, match=r"records no latent statistics: put e2e-100k-latents-stats\.pt beside it"
    ):
        load_latent_stats(folder / "e2e-100k.pt")


def test_wrapped_state_dicts_and_prefixes(tmp_path, tiny_vae):
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in tiny_vae.state_dict().items()}}, tmp_path / "wrapped.pt"
    )
    save_file(
        {f"_orig_mod.{k}": v for k, v in tiny_vae.state_dict().items()}, tmp_path / "compiled.safetensors"
    )
    assert same(load_vae(tmp_path / "wrapped.pt"), tiny_vae) and same(
        load_vae(tmp_path / "compiled.safetensors"), tiny_vae
    )


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_a_diffusers_folder_comes_back_the_same(tmp_path, config):
    vae, channels = random_vae(config), config.latent_channels
    stats = LatentStats(torch.randn(channels), torch.rand(channels) + 0.5)
    folder = export_diffusers(tmp_path / "exported", vae, stats)
    loaded = load_vae(folder)
    assert loaded.config == config and same(loaded, vae)
    found = load_latent_stats(folder)
    torch.testing.assert_close((found.mean, found.std), (stats.mean, stats.std))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    assert same(load_vae(folder), vae)


def test_what_diffusers_itself_writes_is_loaded(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours, x = load_vae(tmp_path), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x).mean, theirs.encode(x).latent_dist.mean, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="records no latent statistics"):
        load_latent_stats(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "VQModel"}, "is a diffusers VQModel"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"latent_channels": None}, "without latent_channels"),
        ({"block_out_channels": [8, 12]}, "block_out_channels"),
        ({"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]}, "blocks"),
    ],
)
def test_other_diffusers_models_are_refused(tmp_path, changes, message):
    folder = export_diffusers(
        tmp_path, random_vae(SMALL["no attention"]), LatentStats(torch.zeros(4), torch.ones(4))
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in (config | changes).items() if value is not None})
    )
    with pytest.raises(ValueError, match=message):
        load_vae(folder)


# ---------------------------------------------------------------- the architecture


def shapes(name):
    """The official state dict of that name, on the meta device."""
    return {
        key: torch.empty(shape, device="meta")
        for key, shape in json.loads((STATE_DICTS / f"{name}.json").read_text()).items()
    }


@pytest.mark.parametrize("name", ["f8d4", "f16d32"])
def test_official_shapes_tell_the_vae(name):
    preset = VAE_PRESETS[name]
    fields = infer.vae_fields(shapes(f"vae_{name}"), "it")
    assert replace(preset, **fields) == preset and set(fields) == set(preset.__dataclass_fields__) - {
        "groups"
    }


@pytest.mark.parametrize("name, vae", [("SiT-B/2", "f8d4"), ("SiT-L/1", "f16d32"), ("SiT-XL/2", "f8d4")])
def test_official_shapes_tell_the_sit(name, vae):
    channels, size = {"f8d4": (4, 32), "f16d32": (32, 16)}[vae]
    preset = replace(SIT_PRESETS[name], in_channels=channels, input_size=size, target_dims=(768,))
    assert replace(preset, **infer.sit_fields(shapes(f"{name.replace('/', '_')}.{vae}"), "it")) == preset


def test_official_shapes_tell_the_discriminator():
    assert infer.discriminator_fields(shapes("discriminator"), "it") == {
        "in_channels": 3,
        "width": 64,
        "layers": 3,
    }


def test_a_sit_of_no_known_size_needs_its_header_or_a_configuration(tmp_path):
    sit = SiT(SHALLOW).eval()
    save_sit(tmp_path / "ours.safetensors", sit)
    assert load_sit(tmp_path / "ours.safetensors").config == SHALLOW
    torch.save(sit.state_dict(), tmp_path / "plain.pt")
    with pytest.raises(
        ValueError, match="width 16 and depth 2, which is no known size, and shapes do not tell its heads"
    ):
        load_sit(tmp_path / "plain.pt")
    loaded = load_sit(tmp_path / "plain.pt", config=SHALLOW)
    assert same(loaded, sit)


def test_a_vae_of_no_known_size_needs_its_header_or_a_configuration(tmp_path):
    config = SMALL["attention in levels"]
    vae = random_vae(config)
    torch.save(vae.state_dict(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"no known size .*shapes do not tell the groups"):
        load_vae(tmp_path / "plain.pt")
    assert same(load_vae(tmp_path / "plain.pt", config=config), vae)


def test_another_number_of_latent_channels_is_no_other_size(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset("tiny", latent_channels=7).eval()
    torch.save(vae.state_dict(), tmp_path / "plain.pt")
    assert load_vae(tmp_path / "plain.pt").config == vae.config


# ---------------------------------------------------------------- refusals


def changed(run, change):
    """Applies a change to the content of a run's last checkpoint."""
    path = run / "checkpoints" / "0000400.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_options_and_weights_that_disagree_name_three_shapes(official):
    run, _ = official
    changed(run, lambda content: setattr(content["args"], "model", "SiT-S/2"))
    with pytest.raises(
        ValueError, match=r"does not fit SiT: (.+ \[.*\] instead of \[.*\]; ){2}.+ \(\d+ in all\)"
    ):
        load_sit(run)
    changed(run, lambda content: setattr(content["args"], "model", "SiT-Z/2"))
    with pytest.raises(ValueError, match="unknown model 'SiT-Z/2'"):
        load_sit(run)


def test_a_sit_without_a_null_class_is_refused(official):
    run, _ = official
    changed(
        run, lambda content: setattr(content["args"], "num_classes", 11)
    )  # as many as the label table has rows
    with pytest.raises(ValueError, match="trained without label dropout, so it has no null class"):
        load_sit(run)


def test_a_state_dict_with_one_name_more_or_less_is_refused(tmp_path, tiny_vae):
    state = tiny_vae.state_dict()
    torch.save(state | {"strange.weight": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(
        ValueError, match=r"does not fit AutoencoderKL: strange\.weight \[1\] instead of nothing \(1 in all\)"
    ):
        load_vae(tmp_path / "more.pt")
    del state["decoder.conv_out.bias"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"decoder\.conv_out\.bias missing instead of \[12\]"):
        load_vae(tmp_path / "less.pt")


class Malicious:
    """Runs a command when it is unpickled the ordinary way."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_refused_by_name(tmp_path, tiny_vae, zipped):
    victim = tmp_path / "ran"
    content = {**tiny_vae.state_dict(), "x": Malicious(victim)}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"wants to run \S*(getattr|Path|touch)\S* when it is read: refused"):
        load_vae(tmp_path / "evil.pt")
    assert not victim.exists()
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Malicious(victim)))
    with pytest.raises(ValueError, match=r"bare\.pt"):
        load_vae(tmp_path / "bare.pt")
    assert not victim.exists()


def test_damaged_and_foreign_files_are_refused(tmp_path, tiny_vae, official):
    torch.save(tiny_vae.state_dict(), tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "empty.pt").touch()
    for name in ("half", "text", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.pt is not a whole file of torch\.save"):
            load_vae(tmp_path / f"{name}.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list: give a file with a state dict"):
        load_vae(tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    with pytest.raises(ValueError, match=r"is no state dict: it holds a \(int\)"):
        load_vae(tmp_path / "numbers.pt")
    torch.save(small_sit().state_dict(), tmp_path / "sit.pt")
    with pytest.raises(ValueError, match=r"holds no VAE: it lacks encoder\.conv_in\.weight"):
        load_vae(tmp_path / "sit.pt")
    with pytest.raises(ValueError, match=r"holds no SiT: it lacks x_embedder\.proj\.weight"):
        load_sit(tmp_path / "whole.pt")
    with pytest.raises(FileNotFoundError, match="do not exist: check the path, or give a Hub id"):
        load_vae(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no VAE: give a file"):
        load_vae(tmp_path / "bare")


def test_a_frozen_run_says_that_its_vae_is_elsewhere(official):
    run, _ = official
    changed(run, lambda content: [content.pop(name) for name in ("vae", "discriminator")])
    with pytest.raises(
        ValueError, match=r"has no vae \(it has ema, model\): a run with a frozen VAE keeps none"
    ):
        load_vae(run)


def test_statistics_of_a_dead_channel_are_refused(tmp_path, tiny_vae):
    dead = LatentStats(torch.zeros(4), torch.tensor([1.0, 2, 0, 1]))
    save_vae(tmp_path / "vae.safetensors", tiny_vae, dead)
    with pytest.raises(ValueError, match="are not finite means and positive, finite standard deviations"):
        load_latent_stats(tmp_path / "vae.safetensors")


# ---------------------------------------------------------------- files that say or hold what cannot be


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensor: tensor.to(torch.int64),
            r"conv_in\.bias of cpu torch\.strided torch\.int64 instead of torch\.float32",
        ),
        (lambda tensor: tensor.to(torch.complex64), "torch.complex64 instead of torch.float32"),
        (lambda tensor: tensor.to_sparse(), "torch.sparse_coo"),
        (lambda tensor: tensor.fill_(float("nan")), r"holds NaN or infinity in encoder\.conv_in\.bias"),
    ],
)
def test_numbers_of_another_kind_are_refused(tmp_path, tiny_vae, change, message):
    state = {name: tensor.clone() for name, tensor in tiny_vae.state_dict().items()}
    state["encoder.conv_in.bias"] = change(state["encoder.conv_in.bias"])
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=message):
        load_vae(tmp_path / "odd.pt", config=tiny_vae.config)


def test_half_precision_and_wrapped_names_load(tmp_path, tiny_vae):
    prefixes = {
        torch.float16: "module._orig_mod.",
        torch.bfloat16: "_orig_mod.module.",
        torch.float64: "module.module.",
    }
    for dtype, prefix in prefixes.items():
        torch.save(
            {prefix + name: tensor.to(dtype) for name, tensor in tiny_vae.state_dict().items()},
            tmp_path / "v.pt",
        )
        loaded = load_vae(tmp_path / "v.pt", config=tiny_vae.config)
        for (name, own), back in zip(
            tiny_vae.state_dict().items(), loaded.state_dict().values(), strict=True
        ):
            assert torch.equal(own.to(dtype).float(), back), name


def test_names_that_are_no_text_are_refused(tmp_path):
    torch.save({1: torch.zeros(1)}, tmp_path / "odd.pt")
    for load in (load_vae, load_sit, load_discriminator):
        with pytest.raises(ValueError, match=r"is no state dict: it holds 1 \(Tensor\)"):
            load(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    "sizes",
    [
        [1],
        3,
        None,
        {"multipliers": []},
        {"latent_channels": None},
        {"latent_channels": -4},
        {"width": "8"},
        {"multipliers": [1, "2"]},
        {"width": 80_000_000},
        {"mid_attention": 1},
        {"blocks": True},
    ],
)
def test_a_header_with_impossible_sizes_is_one_sentence(tmp_path, sizes):
    vae = random_vae(SMALL["no attention"])
    given = asdict(vae.config) | sizes if isinstance(sizes, dict) else sizes
    save_weights(tmp_path / "odd.safetensors", vae, {"vae_config": given})
    with pytest.raises(ValueError, match=r"odd\.safetensors (has a|has sizes|does not fit)") as refusal:
        load_vae(tmp_path / "odd.safetensors")
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    "values",
    [
        ([1.0], [0.0] * 4),
        ([], []),
        ("x", [0.0] * 4),
        ({"a": 1}, [0.0]),
        (None, None),
        ([[1.0, "b"]], [1.0, 2.0]),
    ],
)
def test_statistics_that_are_no_vectors_of_one_length_are_refused(tmp_path, values):
    vae = random_vae(SMALL["no attention"])
    save_weights(tmp_path / "v.safetensors", vae, {"latents_scale": values[0], "latents_bias": values[1]})
    with pytest.raises(ValueError, match="latent statistics"):
        load_latent_stats(tmp_path / "v.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": []},
        {"block_out_channels": [0, 0]},
        {"block_out_channels": "ab"},
        {"latent_channels": "4"},
        {"layers_per_block": 0},
        {"norm_num_groups": True},
        {"down_block_types": 3},
        {"up_block_types": [["UpDecoderBlock2D"]]},
    ],
)
def test_a_diffusers_configuration_of_other_kinds_is_one_sentence(tmp_path, changes):
    folder = export_diffusers(
        tmp_path, random_vae(SMALL["no attention"]), LatentStats(torch.zeros(4), torch.ones(4))
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=f"has a configuration with {next(iter(changes))}="):
        load_vae(folder)


def test_shapes_of_nothing_are_refused(tmp_path, tiny_vae):
    torch.save(tiny_vae.state_dict() | {"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=r"it lacks encoder\.conv_in\.weight or has it in another shape"):
        load_vae(tmp_path / "v.pt")
    torch.save({"main.0.weight": torch.zeros(64, 3, 4, 4)}, tmp_path / "d.pt")
    with pytest.raises(
        ValueError, match="holds no discriminator: it has 1 convolutions, and the smallest has 3"
    ):
        load_discriminator(tmp_path / "d.pt")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_classes", 1000, r"has labels for 10 classes .*num_classes=1000: they do not belong together"),
        ("model", ["SiT-B/2"], "unknown model"),
        ("encoder_depth", "x", r"0000400\.pt has a configuration with alignment_depth='x' \(.* integer\)"),
        ("encoder_depth", 99, r"0000400\.pt has an impossible configuration: alignment depth 99"),
        ("bn_momentum", [1], r"bn_momentum=\[1\] \(.* number\)"),
        ("bn_momentum", float("nan"), "bn_momentum is nan"),
        ("bn_momentum", 7, "bn_momentum is 7"),
    ],
)
def test_options_of_a_run_that_cannot_be_are_one_sentence(official, option, value, message):
    run, _ = official
    changed(run, lambda content: setattr(content["args"], option, value))
    with pytest.raises(ValueError, match=message):
        load_sit(run)


def test_an_empty_folder_of_a_later_step_hides_no_checkpoint(official):
    run, _ = official
    before = load_sit(run)
    (run / "checkpoints" / "0000900").mkdir()
    assert torch.equal(load_sit(run).final_layer.linear.weight, before.final_layer.linear.weight)
