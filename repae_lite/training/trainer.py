"""The training loop: `repae train-repae`, `train-ldm` and `train-vae`, on one CPU core or many machines.

The method is in `repae_lite.method.steps`; here is what keeps a long run alive. A run that is stopped, killed
and resumed gives the numbers of one that was not, because nothing random depends on the past
(`repae_lite.training.parallel`) and a checkpoint is whole or not there (`repae_lite.training.run_folder`).
Taught in `notebooks/05_end_to_end.ipynb`: this is its loop, with a folder around it.
"""

import json
import logging
import math
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repae_lite.data.datasets import read_batches
from repae_lite.data.latents import vae_fingerprint
from repae_lite.data.targets import cache_targets
from repae_lite.evaluation.generate import Sampling, draw_images
from repae_lite.method.losses import spatial_norm
from repae_lite.method.steps import GRAD_NORMS, Draws, all_updates, check_norm, latent_updates
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.sit import SiT
from repae_lite.training.build import build, compiled_parts, latent_stats, open_data, run_judge
from repae_lite.training.config import TrainConfig, differences, values
from repae_lite.training.divergence import Finding, Guard
from repae_lite.training.parallel import DDP, ParallelMechanics, StepBatches, draw, share_of
from repae_lite.training.run_folder import (
    Checkpoint,
    RunFolder,
    checkpoint_bytes,
    fill,
    fill_optimizer,
    find_checkpoint,
    newest,
    read_checkpoint,
    with_way_out,
)
from repae_lite.training.run_log import RunLog, check_tracker
from repae_lite.utils.devices import Later, check_device, choose_precision, loading, runs_ahead, try_compile
from repae_lite.utils.files import set_aside, write_text
from repae_lite.utils.locks import locked
from repae_lite.utils.output import patient_output
from repae_lite.utils.pixels import save_grid, to_uint8, to_unit_range
from repae_lite.utils.processes import (
    STOPPING,
    WAITING,
    StopFlag,
    check_settings,
    ignore_stop_signals,
    join,
    mean_over_processes,
    same_everywhere,
    settings,
    started_together,
    together,
)
from repae_lite.utils.seeding import generator

ROLLBACKS = 3
SAMPLE_STEPS = 25
HALTED = 3  # exit code of the collapse guard; others in repae_lite.commands.train_flags.EXIT_CODES
logger = logging.getLogger(__name__)


@patient_output()
def train(config: TrainConfig) -> None:
    """Trains until the last step, a signal, or a collapse.

    Raises:
        ValueError, FileNotFoundError, OSError: an option, the data or the disk; nothing was overwritten.
        SystemExit: 143 or 130 after a signal, 3 when the collapse guard halted the run.
    """
    check_tracker(config.report_to)
    accelerator = _accelerator(config)
    with ExitStack() as stack:
        folder, start = RunFolder(config.folder), [None, None]
        with together():
            if accelerator.is_main_process:
                stack.enter_context(_claimed(folder.path))
                _check_new(config, folder)
                folder.remove_leftovers()
                if config.resume_from:
                    folder.finish_rollback()
                    source = find_checkpoint(config.resume_from, folder)
                    start = [source, folder.rollbacks_since(source)]
        Trainer(config, accelerator, folder).run(*broadcast_object_list(start))


def _accelerator(config: TrainConfig) -> Accelerator:
    """This process's device and the others, with the tracker.

    Raises:
        ValueError, ConnectionError: a launcher's or accelerate's settings, see `repae_lite.utils.processes`.
    """
    check_settings()
    if started_together():
        join(cpu=config.cpu)
    try:
        accelerator = Accelerator(
            mixed_precision="no",
            cpu=config.cpu,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
            ),
            kwargs_handlers=[DDP, InitProcessGroupKwargs(timeout=WAITING)],  # of a group that MPI started
        )
    except (ValueError, KeyError, ImportError, NotImplementedError) as error:
        raise ValueError(f"accelerate cannot start ({error}): look at its settings ({settings()})") from None
    own = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if accelerator.is_main_process and own not in ("", "no", config.mixed_precision):
        logger.warning(
            f"accelerate's mixed precision, {own}, is not used: what counts is --mixed-precision "
            f"{config.mixed_precision}"
        )
    return accelerator


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Holds a run's folder; what was made for that goes again if nothing came of it, as after a refusal."""
    before = {*os.listdir(path)} if path.is_dir() else set()
    made = [place for place in (path / "lock" / "lock", path / "lock", path) if not os.path.lexists(place)]
    with locked(path / "lock"):
        try:
            yield
        finally:
            with suppress(OSError):  # what stays is an empty folder
                if {*os.listdir(path)} == before | {"lock"}:
                    for place in made:
                        place.rmdir() if place.is_dir() else place.unlink()


def _check_new(config: TrainConfig, folder: RunFolder) -> None:
    """Refuses to start over in a folder that holds a run, or whose checkpoints are somewhere else now."""
    lost = folder.lost_checkpoint()
    if lost is not None:
        raise ValueError(
            f"{folder.path} is of a run that has saved a checkpoint of step {lost}, but there is none in "
            f"{folder.checkpoints_path}: mount it or move it back, or choose another --exp-name"
        )
    if config.resume_from is None and (folder.checkpoints() or folder.metrics_path.exists()):
        steps = f"up to step {max(folder.checkpoints())}" if folder.checkpoints() else "without a checkpoint"
        raise ValueError(
            f"{folder.path} already holds a run, {steps}: go on with --resume latest, or choose another "
            "--exp-name"
        )


class Trainer:
    """One run in one process.

    Args:
        config: its options.
        accelerator: device, processes and trackers.
        folder: where the first process writes.
    """

    @together()
    def __init__(self, config: TrainConfig, accelerator: Accelerator, folder: RunFolder):
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.device, self.main = accelerator.device, accelerator.is_main_process
        check_device(self.device, asked=config.cpu)
        self.data = open_data(config)
        self.share = share_of(config.images_per_step, accelerator.process_index, accelerator.num_processes)
        cuts = config.gradient_accumulation_steps * config.micro_batches
        if cuts > self.share.stop - self.share.start:
            raise ValueError(
                f"{self.share.stop - self.share.start} images per process cannot be cut into {cuts} "
                "micro-batches: lower --micro-batches"
            )
        if config.shard and accelerator.num_processes == 1:
            raise ValueError(
                "--shard cuts SiT into a part for each process, and there is one: start several with "
                "accelerate launch or torchrun, or leave it out"
            )
        per_epoch = self._batches(range(0)).per_epoch
        self.last_step = min(config.max_train_steps, per_epoch * (config.epochs or math.inf))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        setup = build(config, self.data.num_classes, self.device)
        self.state, self.encoders, self.rates = setup.state, setup.encoders, setup.rates
        self.networks = setup.networks()
        self.frozen_vae = vae_fingerprint(self.state.vae) if config.command == "ldm" else None
        self.precision = choose_precision(config.mixed_precision, self.device)
        config.check_precision(self.precision)
        self.mechanics = self.state.mechanics = ParallelMechanics(
            self.device,
            self.precision,
            self.state.optimizers,
            strict=config.on_divergence != "off",
            micro_batches=cuts,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.guard = Guard(
            patience=config.divergence_patience,
            falls=config.divergence_falls,
            variance=config.divergence_variance,
        )
        self.unread: deque[tuple[int, Later, dict]] = deque()  # steps that the guard has not been told of
        self.stop = StopFlag(self.device)
        self.sharded = None  # a ShardedSiT with --shard
        self.rollbacks = 0
        self.judge = run_judge(config, self.device)
        if self.judge:
            self.judge.protocol.check(self.state.sit.config)
        if config.compile:
            _compile(self.state, self.device)

    # ---------------------------------------------------------------- the loop

    def run(self, source: Path | None, rollbacks: int | None) -> None:
        """Trains from a checkpoint, or from the beginning for None; `rollbacks` that it does not know of."""
        state, config = self.state, self.config
        own = source is not None and source.resolve().parent == self.folder.checkpoints_path.resolve()
        with together():
            if source is not None:
                with with_way_out(source, own=own):
                    checkpoint = read_checkpoint(source)
                self._resume(checkpoint, own=own, rollbacks=rollbacks)
            if self.main:
                self._open_folder(own)
        same_everywhere(*self.networks.values())
        self._distribute()
        if config.on_divergence == "rollback" and state.step == 0:
            self._save()
        if config.cache_targets:
            self._cache_targets()
        log = RunLog(
            config,
            self.accelerator,
            self.folder,
            parameters={
                name: sum(p.numel() for p in module.parameters() if p.requires_grad)
                for name, module in self.networks.items()
                if name in state.optimizers
            },
            precision=self.precision,
            first=state.step,
            last=self.last_step,
        )
        with _signals() as caught, log:
            while state.step < self.last_step:
                finding = self._steps(log, caught)
                if finding:
                    log.ended = finding.what
                    self._diverged(finding)
                    log.ended = None
                    log.back_to(state.step)
                elif self.stop.up:
                    self._save()
                    name = signal.Signals(caught[0]).name if caught else "a signal to another process"
                    log.ended = f"stopped by {name}"
                    raise SystemExit(130 if caught and caught[0] == signal.SIGINT else 143)
            self._save()
            log.ended = "finished"

    def _distribute(self) -> None:
        """Lets all processes train the same networks."""
        networks = {name: self.networks[name] for name in self.state.optimizers}
        if self.config.shard:
            from repae_lite.training.sharding import ShardedSiT  # slow to import: only --shard pays for it

            sit, optimizer = networks.pop("sit"), self.state.optimizers["sit"]
            self.sharded = ShardedSiT(sit, self.state.ema, optimizer, self.device)
        self.mechanics.distribute(self.accelerator, networks, self.sharded)

    def _open_folder(self, own: bool) -> None:
        """Makes the folder ready for what this start writes; `own`: it goes on from a checkpoint of its own.

        Raises:
            OSError: the disk cannot hold it.
        """
        config, folder, step, last = self.config, self.folder, self.state.step, self.last_step
        every = config.checkpointing_steps
        folder.check_disk(
            checkpoint_bytes(self.networks, self.state.optimizers, config.checkpoint_format),
            planned=max(0, last // every - step // every + (last % every > 0)),
            keep_last=config.keep_last,
        )
        options, text = folder.path / "args.json", json.dumps(self._args(), indent=2) + "\n"
        if own:
            folder.cut_metrics(step)
            self._tell_other_protocol()
        else:
            for path in (folder.metrics_path, options):
                if path.exists() and path.read_bytes() not in (b"", text.encode()):
                    set_aside(path, "is not of this start")
            for path in (folder.path / "samples", folder.path / "divergence"):
                if path.is_dir() and any(path.iterdir()):
                    set_aside(path, "is not of this start")
        if not own or not options.exists():
            write_text(options, text)

    def _tell_other_protocol(self) -> None:
        """Warns if the run was judged by another protocol until now."""
        if not self.judge or not self.folder.metrics_path.exists():
            return
        now, keys = self._eval_protocol(), ("eval_protocol", "eval_protocol_hash")
        judged = [line for line in self.folder.metrics() if keys[1] in line]
        if judged and judged[-1][keys[1]] != now[keys[1]]:
            then, now = (" ".join(str(values.get(key)) for key in keys) for values in (judged[-1], now))
            logger.warning(
                f"{self.folder.metrics_path} has evaluations by protocol {then}, and from here on by {now}: "
                "compare only numbers of one eval_protocol_hash"
            )

    def _steps(self, log: RunLog, caught: list[int]) -> Finding | None:
        """Steps until the end, a signal or a finding."""
        state, config = self.state, self.config
        with closing(read_batches(self._loader())) as batches:
            for batch in batches:
                try:
                    finding = self._noted(self._step(batch), log)
                except FloatingPointError as error:
                    finding = _not_finite(error, state.step + 1)
                if finding:
                    return finding
                if config.sampling_steps and state.step % config.sampling_steps == 0:
                    self._sample()
                if self.judge and state.step % config.eval_every == 0:
                    log.add(state.step, self._evaluate())
                if state.step % config.checkpointing_steps == 0:
                    self._save()
                    log.checkpointed()
                if self.stop.after_step(bool(caught)):
                    return self._ask_guard(log)
        return None

    def _batches(self, steps: range) -> StepBatches:
        """Which images this process takes in these steps."""
        config = self.config
        return StepBatches(
            len(self.data), batch=config.images_per_step, share=self.share, seed=config.seed, steps=steps
        )

    def _loader(self) -> DataLoader:
        """This process's batches, from the state's step on."""
        workers = self.config.workers
        return DataLoader(
            self.data,
            batch_sampler=self._batches(range(self.state.step, self.last_step)),
            num_workers=workers,
            generator=torch.Generator(),  # its own: the workers' seeds would come from torch's
            worker_init_fn=ignore_stop_signals,
            **loading(self.device, workers),
        )

    def _step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step of the method; losses stay on the device."""
        state, config = self.state, self.config
        self._set_rates()
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        labels, draws = batch["label"], self._draws()
        x = to_unit_range(batch["image"]) if "image" in batch else None
        targets = self._targets(batch)
        if config.command != "ldm":
            losses, z = all_updates(state, x, labels, targets, draws)
            return losses | {"latent_variance": z.float().var((2, 3)).mean()}
        z = self._frozen_latents(batch, x, draws.eps_posterior)
        return latent_updates(state, z, labels, targets, draws)

    def _set_rates(self) -> None:
        """Gives every optimiser the learning rate of the coming step."""
        warmup = self.config.lr_warmup_steps
        factor = min(1.0, (self.state.step + 1) / warmup) if warmup else 1.0
        for name, optimizer in self.state.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * factor * 0.5**self.rollbacks

    def _draws(self) -> Draws:
        """This process's share of the step's random numbers."""
        config, vae = self.config, self.state.vae.config
        side = config.resolution // vae.downsampling
        return draw(
            config.seed,
            self.state.step,
            config.images_per_step,
            (vae.latent_channels, side, side),
            path=config.path_type,
            weighting=config.weighting,
            label_dropout=config.cfg_prob,
            share=self.share,
            device=self.device,
        )

    def _targets(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """The encoders' tokens: cached, or computed now, in micro-batches like the step's."""
        targets = [tokens.float() for name, tokens in batch.items() if name.startswith("target")]
        if self.encoders:
            chunks = [batch["image"][chunk] for chunk in self.mechanics.chunks(len(batch["image"]))]
            with self.mechanics.autocast():
                targets = [torch.cat([encoder(chunk) for chunk in chunks]) for encoder in self.encoders]
        gamma = self.config.spatial_norm
        return targets if gamma is None else [spatial_norm(target, gamma) for target in targets]

    def _cache_targets(self) -> None:
        """Has the encoders' tokens read from a file, which is written first if need be, and lets them go."""
        share, cuts = self.share.stop - self.share.start, self.mechanics.micro_batches
        self.data.targets = cache_targets(
            self.encoders,
            self.data.images,
            self.config.cache_targets,
            batch_size=max(1, share // cuts),
            workers=self.config.workers,
            device=self.device,
            progress=self.main,
        )
        self.encoders = []

    @torch.no_grad()
    def _frozen_latents(self, batch: dict[str, Tensor], x: Tensor | None, eps: Tensor) -> Tensor:
        """Latents of the frozen VAE, from its posterior: cached, or encoded now."""
        if "latent" in batch:
            mean, std = batch["latent"].float().chunk(2, dim=1)
            return mean + std * eps
        latents = []
        for chunk in self.mechanics.chunks(len(x)):
            with self.mechanics.autocast():
                latents.append(self.state.vae.encode(x[chunk]).sample(eps[chunk]))
        return torch.cat(latents)

    def _noted(self, losses: dict[str, Tensor], log: RunLog) -> Finding | None:
        """Logs the step when it is due, and asks the guard.

        A GPU is not waited for: it works on this step while the guard is asked about the one before. Only
        what is logged, drawn or saved is asked about at once.
        """
        step, config = self.state.step, self.config
        last, told = step == self.last_step, {}
        if last or step % config.logging_steps == 0:
            told = losses
        else:
            log.passed(step)
        seen = (config.logging_steps, config.sampling_steps, config.checkpointing_steps, config.eval_every)
        watched = {name: losses[norm] for name, norm in GRAD_NORMS.items() if norm in losses}
        watched |= {f"loss_scale_{name}": scale for name, scale in self.mechanics.scales().items()}
        self.unread.append((step, Later(watched), told))
        wait = last or not runs_ahead(self.device) or any(n and step % n == 0 for n in seen)
        return self._ask_guard(log, but=0 if wait else 1)

    def _ask_guard(self, log: RunLog, *, but: int = 0) -> Finding | None:
        """What is wrong with the steps that the guard has not been told of, but for the last ones."""
        while len(self.unread) > but:
            step, later, losses = self.unread.popleft()
            watched, record = later.read(), None
            norms = {name: watched.pop(name) for name in GRAD_NORMS if name in watched}
            if self.mechanics.failed is not None:
                try:
                    for name, norm in norms.items():
                        check_norm(norm, self.networks[name])
                except FloatingPointError as error:
                    return _not_finite(error, step)
            if losses:
                read = mean_over_processes(torch.stack([value.float() for value in losses.values()])).tolist()
                record = dict(zip(losses, read, strict=True))
                record |= {f"lr_{name}": o.param_groups[0]["lr"] for name, o in self.state.optimizers.items()}
                record |= watched
                with together():
                    log.log(step, record)
            scales = {name.removeprefix("loss_scale_"): scale for name, scale in watched.items()}
            finding = self.guard.check(step, norms, scales, record)
            if finding and self.config.on_divergence != "off":
                return finding
        return None

    # ---------------------------------------------------------------- checkpoints, collapse, samples

    @together()
    def _save(self) -> None:
        """Writes a checkpoint of the current step, and removes old ones."""
        networks, optimizers = self._whole()
        if self.main and self.state.step not in self.folder.checkpoints():
            config, state = self.config, self.state
            self.folder.sync_metrics()
            groups = {
                name: {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
                for name, optimizer in state.optimizers.items()
            }
            extras = {
                "args": self._args(),
                "fixed": config.fixed(),
                "data": self.data.fingerprint,
                "vae": self.frozen_vae,
                "vae_loss": self._vae_loss(),
                "scalers": self.mechanics.state_dict(),
                "guard": self.guard.state_dict(),
                "rollbacks": self.rollbacks,
                "groups": groups,
            }
            self.folder.save(
                state.step,
                networks,
                optimizers,
                self._latent_stats(),
                extras,
                kind=config.checkpoint_format,
                interim=state.step % config.checkpointing_steps > 0 and state.step < self.last_step,
            )
            self.folder.prune(keep_last=config.keep_last, milestone_steps=config.milestone_steps)

    def _whole(self) -> tuple[dict[str, nn.Module], dict[str, torch.optim.Optimizer]]:
        """Networks and optimisers for a checkpoint; pieces are put together in the first process's memory."""
        networks, optimizers = self.networks, self.state.optimizers
        if self.sharded:
            device = torch.device("cpu" if self.main else "meta")
            copies = {name: self.sharded.whole(networks[name], device) for name in ("sit", "ema")}
            networks = networks | copies
            optimizers = optimizers | {"sit": self.sharded.whole_optimizer(copies["sit"])}
        return networks, optimizers

    def _whole_ema(self, *, wanted: bool = True) -> SiT | None:
        """The moving average, to sample from; all processes must call this, and those that want it get it."""
        device = self.device if wanted else torch.device("meta")
        return self.sharded.whole(self.state.ema, device) if self.sharded else self.state.ema

    def _args(self) -> dict:
        """The options as they are stored, with what the networks made of those not given."""
        sit = self.state.sit and self.state.sit.config
        return values(self.config) | (
            {"num_classes": sit.num_classes, "encoder_depth": sit.alignment_depth} if sit else {}
        )

    def _latent_stats(self) -> LatentStats | None:
        """Of the training VAE's latents; None for a frozen one."""
        if "vae" not in self.state.optimizers:
            return None
        if self.state.sit is not None:
            return self.state.sit.latent_stats()
        return latent_stats(self.state.vae, self.data, self.device)

    def _resume(self, checkpoint: Checkpoint, *, own: bool, rollbacks: int | None = None) -> None:
        """Continues from a checkpoint; one of this run (own) must have the same options and data.

        Args:
            checkpoint: as read.
            own: see above.
            rollbacks: of this run; None for those that the checkpoint knows of.

        Raises:
            ValueError: another architecture, other options, other data.
        """
        extras, config = checkpoint.extras, self.config
        if own and extras:
            with with_way_out(checkpoint.path, own=True):
                self._check_own(checkpoint)
            changed = differences(extras["fixed"], config)
            if changed:
                raise ValueError(
                    f"{checkpoint.path} is of a run with other options: {'; '.join(changed[:3])} "
                    f"({len(changed)} in all)"
                )
            if extras["data"] != self.data.fingerprint:
                raise ValueError(
                    f"{checkpoint.path} is of a run on other data than {config.data_dir}: name that, or "
                    "start another run"
                )
            if extras.get("vae_loss", self._vae_loss()) != self._vae_loss():
                raise ValueError(
                    f"{checkpoint.path} is of a run with other weights of the losses than "
                    f"{config.loss_cfg_path} now"
                )
            self._tell_other_parts(extras.get("args", {}))
        if self.frozen_vae and not self._is_of_this_vae(checkpoint):
            raise ValueError(
                f"{checkpoint.path} is of a run on another VAE than {config.vae_ckpt}: name it, or start "
                "another run"
            )
        before = (extras.get("args") or {}).get("optimizer", "AdamW")
        if before.lower() != config.optimizer.lower():
            raise ValueError(
                f"{checkpoint.path} holds the state of {before}, not of {config.optimizer}: give --optimizer "
                f"{before}"
            )
        with with_way_out(checkpoint.path, own=True) if own else nullcontext():
            fill(self.networks, checkpoint)
            for name, optimizer in self.state.optimizers.items():
                states = checkpoint.optimizers.get(name, {})
                fill_optimizer(optimizer, self.networks[name], states, checkpoint.path)
                if not states and checkpoint.step and "betas" in optimizer.defaults:
                    logger.warning(f"{checkpoint.path} has no optimiser states of {name}: they start anew")
        self.state.step = checkpoint.step
        known = extras.get("rollbacks", 0)
        self.rollbacks = known if rollbacks is None else rollbacks
        self.unread.clear()
        self.mechanics.load_state_dict(extras.get("scalers", {}), 0.5 ** (self.rollbacks - known))
        if "guard" in extras:
            self.guard.load_state_dict(extras["guard"])

    def _tell_other_parts(self, before: dict) -> None:
        """Warns if the discriminator's BatchNorm sees another number of images than until now (D10)."""
        now = self.config.micro_batches
        if self.main and self.state.discriminator is not None and before.get("micro_batches", now) != now:
            logger.warning(
                f"--micro-batches is {now} from here on, and was {before['micro_batches']}: the "
                "discriminator's BatchNorm sees each part alone, so its numbers change a little "
                "(DIFFERENCES.md, D10)"
            )

    def _check_own(self, checkpoint: Checkpoint) -> None:
        """Refuses a checkpoint of this run that lacks what this run put into it.

        Raises:
            ValueError: what it lacks; or it is of another step than its name.
        """
        path = checkpoint.path
        missing = [name for name in ("fixed", "data") if name not in checkpoint.extras]
        for name, optimizer in self.state.optimizers.items():
            if checkpoint.step and "betas" in optimizer.defaults and not checkpoint.optimizers.get(name):
                missing.append(f"optimiser states of {name}")
        if missing:
            raise ValueError(f"{path} is damaged: it has no {missing[0]}")
        if checkpoint.step != int(path.stem):
            raise ValueError(f"{path} is the checkpoint of step {checkpoint.step} under another name")

    def _vae_loss(self) -> dict:
        return asdict(self.state.config.vae_loss)

    def _is_of_this_vae(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint's SiT was trained on the frozen VAE, as far as can be told."""
        if "vae" in checkpoint.networks:
            own, other = self.state.vae.state_dict(), checkpoint.networks["vae"]
            return own.keys() == other.keys() and all(
                torch.equal(own[name].cpu(), other[name].cpu()) for name in own
            )
        return checkpoint.extras.get("vae", self.frozen_vae) == self.frozen_vae

    def _diverged(self, finding: Finding) -> None:
        """Keeps the evidence, then rolls back or ends the run."""
        (step,) = broadcast_object_list([newest(self.folder.checkpoints(), before=finding.since)])
        can = self.config.on_divergence == "rollback" and self.rollbacks < ROLLBACKS and step is not None
        action = f"rolled back to step {step}, learning rates and loss scales halved" if can else "halted"
        sentence = f"collapse guard: {finding.what}"
        with together():
            if self.main:
                content = {
                    "finding": finding.what,
                    "since": finding.since,
                    "step": self.state.step,
                    "action": action,
                    "last_good_checkpoint": step,
                    "rollbacks": self.rollbacks,
                    "history": list(self.guard.history),
                }
                report = self.folder.report(self.state.step, content)
                logger.warning(f"{sentence}; {action}; see {report}")
                if can:
                    self.folder.roll_back(step, self.rollbacks + 1)
        if not can:
            raise SystemExit(HALTED)
        with together():
            checkpoint = read_checkpoint(self.folder.checkpoints()[step])
            self._resume(checkpoint, own=True, rollbacks=self.rollbacks + 1)

    @together()
    @torch.no_grad()
    def _evaluate(self) -> dict[str, float | str]:
        """Metrics of the moving average's samples by the run's protocol, and which that is."""
        state, training = self.state, self.state.vae.training
        state.vae.eval()
        found = self.judge(
            self._whole_ema(), state.vae, seed=self.config.seed, path_type=self.config.path_type
        )
        state.vae.train(training)
        return {f"eval_{name}": value for name, value in found.items()} | self._eval_protocol()

    def _eval_protocol(self) -> dict[str, str]:
        name = Path(self.config.eval_protocol).stem
        return {"eval_protocol": name, "eval_protocol_hash": self.judge.record["hash"]}

    @torch.no_grad()
    def _sample(self) -> None:
        """Draws a grid of the moving average's samples, or of a lone VAE's reconstructions."""
        ema = self._whole_ema(wanted=self.main)
        if self.main:
            state, count = self.state, self.config.sample_images
            training = state.vae.training
            state.vae.eval()
            if state.sit is None:
                x = to_unit_range(
                    torch.stack([self.data[i]["image"] for i in range(min(count, len(self.data)))])
                ).to(self.device)
                images = to_uint8(torch.cat([x, state.vae.decode(state.vae.encode(x).mode())]))
            else:
                size, g = ema.config, generator("samples", self.config.seed)
                eps = torch.randn(count, size.in_channels, size.input_size, size.input_size, generator=g)
                labels = torch.arange(count) % size.num_classes
                sampling = Sampling(
                    steps=SAMPLE_STEPS, path_type=self.config.path_type, count=count, to_uint8="round"
                )
                (images,) = draw_images(ema, state.vae, sampling, range(count), labels, eps=eps)
            state.vae.train(training)
            path = self.folder.path / "samples" / f"{state.step:07d}.png"
            try:
                save_grid(path, images.cpu())
            except OSError as error:
                logger.warning(f"{path} cannot be written ({error.strerror or error}): training goes on")


def _not_finite(error: FloatingPointError, step: int) -> Finding:
    return Finding(f"{error} (in step {step})", step)


def _compile(state, device: torch.device) -> None:
    """Compiles SiT's blocks and the VAE, or says why not."""
    obstacle = try_compile(device)
    if obstacle:
        logger.warning(f"training goes on without --compile: {obstacle}")
        return
    # What is compiled is small already: one block's gradients are averaged while the next one computes. The
    # cuts of DistributedDataParallel would not help, and older versions of torch refuse them where
    # activations are recomputed.
    torch._dynamo.config.optimize_ddp = False
    for module in compiled_parts(state):
        module.compile()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Inside, the first SIGTERM, SIGUSR1 or SIGINT is noted; a second Ctrl-C ends the process at once."""
    caught: list[int] = []
    before: dict[int, Callable] = {}

    def note(number: int, _) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
