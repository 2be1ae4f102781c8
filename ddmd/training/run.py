"""One run: data and split, both ensembles, the denoiser with its rounds of pseudo-masks, the weights."""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ddmd import validation
from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import find_cases
from ddmd.cohort.splits import split_by_patient, write_split
from ddmd.diffusion.schedule import Schedule
from ddmd.io.atomic import write_text
from ddmd.models import checkpoint
from ddmd.models.autoencoder import AutoencoderEnsemble
from ddmd.models.checkpoint import System, pick_dtype
from ddmd.models.denoiser import ConditionNet, Denoiser
from ddmd.training.batch_maker import BatchMaker
from ddmd.training.batch_maker import Stage as BatchStage
from ddmd.training.config import TrainConfig, read_config, validate
from ddmd.training.device_slices import DeviceSlices
from ddmd.training.initial_weights import initial_system, keep_start
from ddmd.training.loop import Plan, Stage, TrainingStopped
from ddmd.training.prepared_case import (
    PreparedCase,
    load_cases,
    load_pseudo_masks,
    save_pseudo_masks,
    sequences_of,
)
from ddmd.training.pseudo_masks import update_pseudo_masks
from ddmd.training.run_folder import (
    check_folder,
    check_split,
    config_text,
    earlier_run_name,
    locked,
    remove_run,
)
from ddmd.training.stages import AutoencoderLosses, DenoiserLosses

log = logging.getLogger("ddmd.training")
LOG_EVERY = 100  # steps between lines of the log where there is no terminal
SHOWN = 8  # samples of a stage that TensorBoard shows


class TrainingWarning(UserWarning):
    """What a user should know of the data before a training is trusted."""


def cases_of(config: TrainConfig) -> list[Case]:
    """Every case of the configured data sets that has the sequences."""
    required, _ = sequences_of(config)
    cases = []
    for entry in config.data:
        found = find_cases(entry.root, entry.layout, entry.name)
        usable = [
            dataclasses.replace(case, source=entry.source)
            for case in found
            if all(sequence in case.files for sequence in required)
            and any(sequence in case.files for sequence in config.sequences)
        ]
        notes = [*found.notes]
        if len(usable) < len(found):
            notes.append(
                f"left aside: {len(found) - len(usable)} cases without the sequences of the configuration"
            )
        for note in notes:
            log.info("%s: %s", entry.source, note)
        cases += usable
    return cases


def split_of(config: TrainConfig, cases: list[Case]) -> dict[str, str]:
    """patient -> "train", "validation" or "test"; held-out patients are "test"."""
    fractions = {
        "train": 1 - config.validation - config.test,
        "validation": config.validation,
        "test": config.test,
    }
    whole = {entry.source for entry in config.data if not entry.split}
    seed = config.seed if config.split_seed is None else config.split_seed
    split = split_by_patient((c for c in cases if c.source not in whole), fractions, seed)
    split |= {case.patient: "train" for case in cases if case.source in whole}
    split |= {case.patient: "validation" for case in cases if case.patient in config.validation_patients}
    return split | {case.patient: "test" for case in cases if case.patient in config.holdout}


def _warn_of_unknown_patients(config: TrainConfig, cases: list[Case]) -> None:
    """Warn of patients who are to be kept out of training and are in no data set: under another name, they are in."""
    there = {case.patient for case in cases}
    for entry in ("holdout", "validation_patients"):
        unknown = [patient for patient in getattr(config, entry) if patient not in there]
        if unknown:
            warnings.warn(
                f"{entry} names patients whom no data set has: {', '.join(unknown[:5])}"
                f"{', ...' if len(unknown) > 5 else ''}; a patient under another name is not kept out of training",
                TrainingWarning,
                stacklevel=2,
            )


def train(
    config: str | Path | TrainConfig, out: str | Path, until: str | None = None, overwrite: bool = False
) -> Path:
    """Train a system, or go on with a run that was killed.

    Parameters
    ----------
    config : path of a TOML file, or TrainConfig
    out : path
        The run's folder: config.json, split.json, checkpoints, TensorBoard events, the weights.
    until : "autoencoders_a", "autoencoders_b", "denoiser", or with later stages "denoiser_2" and so on, optional
        Stop after this stage.
    overwrite : bool
        Whether an earlier run in the folder is removed, of this configuration or another, and training begins
        anew. Nothing is removed before the configuration, the system it begins from and the data are
        known to be usable.

    Returns
    -------
    Path of the weights, or of the folder where `until` is not the last stage.

    Raises
    ------
    ValueError
        If the configuration, the system it begins from or the data is not usable, or the folder holds another
        run; with `overwrite`, if it holds a config.json that is not of a run, or the system to begin from.
    DivergedError
        If the loss stops being a number.
    """
    config = config if isinstance(config, TrainConfig) else read_config(config)
    validate(dataclasses.asdict(config), "the configuration")
    overwrite = validation.flag("overwrite", overwrite)  # what is no flag must not remove a run
    out = Path(out)
    accelerator = _accelerator()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _interrupted_by_sigterm(), locked(out, accelerator.is_main_process):
            return _train(config, out, until, overwrite, accelerator)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{out}: {error}; make room or mend what it names, and start again: the run goes on from its last "
            "checkpoint"
        ) from error


def _accelerator() -> Any:
    try:
        import tensorboard  # noqa: F401  (what the main process writes its log with)
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        raise ValueError(f"training needs {error.name}; install it with pip install 'ddmd[train]'") from None
    return Accelerator()


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: in one line, with its last checkpoint kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise TrainingStopped("stopped by SIGTERM", number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(config: TrainConfig, out: Path, until: str | None, overwrite: bool, accelerator: Any) -> Path:
    if overwrite:
        earlier_run_name(out)
    else:
        check_folder(config, out)
    if until is not None and until not in (names := config.stage_names):
        raise ValueError(f"until is {until!r}; allowed are the stages of this run: {', '.join(names)}")
    initial = initial_system(config, out, overwrite)
    cases = cases_of(config)
    _warn_of_unknown_patients(config, cases)
    split = split_of(config, cases)
    if not overwrite:
        check_split(split, out)
    training = [case for case in cases if split[case.patient] == "train"]
    if config.labels == "image":  # nothing below can open a mask it does not know of
        training = [dataclasses.replace(case, masks=None) for case in training]
    if not training:
        raise ValueError("no patient is left to train on; lower the shares of validation and test patients")
    log.info("reading %d cases", len(training))
    prepared = load_cases(training, config, read_masks=config.labels == "pixel")
    accelerator.wait_for_everyone()  # what the main process changes here, all have read
    if accelerator.is_main_process:
        if overwrite:
            remove_run(out)
        keep_start(config, out)
        write_text(out / "config.json", config_text(config))
        write_split(out / "split.json", split)
    accelerator.wait_for_everyone()
    run = _Run(config, out, accelerator, prepared, initial)
    stages = run.stages()
    for name, stage in stages.items():
        stage()
        if name == until:
            break
    if until is not None and until != list(stages)[-1]:
        return out
    path = out / f"{config.name}.safetensors"
    if accelerator.is_main_process:
        from ddmd.training.export import describe

        description = describe(config, split, run.schedule)
        ensembles = run.autoencoders["a"], run.autoencoders["b"]
        checkpoint.save(System(description, *ensembles, run.condition, run.denoiser), path)
    accelerator.wait_for_everyone()
    return path


class _Run:
    """The networks of one run and the stages that train them, in order."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        accelerator: Any,
        cases: list[PreparedCase],
        initial: System | None,
    ) -> None:
        self.config, self.out, self.accelerator = config, out, accelerator
        self.slices = DeviceSlices(cases, accelerator.device, config.mm)
        self.dtype = pick_dtype(config.precision, accelerator.device)
        torch.manual_seed(config.seed)
        self.autoencoders = {
            "a": AutoencoderEnsemble(config.autoencoder),
            "b": AutoencoderEnsemble(config.autoencoder),
        }
        self.condition, self.denoiser = ConditionNet(config.denoiser), Denoiser(config.denoiser)
        self.schedule = Schedule()
        if initial is not None:
            for name, module in initial.parts().items():
                self.networks()[name].load_state_dict(module.state_dict())
        self.writer: Any = None
        if accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(out / "events"))

    def networks(self) -> dict[str, nn.Module]:
        """All networks by the name of `ddmd.weights.PARTS`."""
        return {
            "autoencoders_a": self.autoencoders["a"], "autoencoders_b": self.autoencoders["b"],
            "condition": self.condition, "denoiser": self.denoiser,
        }  # fmt: skip

    def stages(self) -> dict[str, Callable[[], None]]:
        """What trains each of the configuration's `stage_names`, in order."""
        trainers = {f"autoencoders_{which}": partial(self._autoencoders, which) for which in "ab"}
        trainers |= {
            name: partial(self._denoiser, number)
            for number, name in enumerate(self.config.denoiser_stage_names)
        }
        return {name: trainers[name] for name in self.config.stage_names}

    def batches(self, stage: BatchStage, config: TrainConfig | None = None) -> BatchMaker:
        """What makes the batches of a stage; `config` with that stage of the denoiser, where there are several."""
        config = config or self.config
        shares = {entry.name or Path(entry.root).name: entry.weight for entry in config.data}
        return BatchMaker(self.slices, config, stage, shares, self.schedule.steps)

    def _stage(self, name: str, losses: nn.Module, steps: int, batch: int, rate: float, ema: float) -> Stage:
        plan = Plan(name, steps, batch, rate, ema, self.config.checkpoint_minutes, self.dtype)
        return Stage(losses, plan, self.out, self.accelerator)

    def _logger(self, name: str) -> Callable[[int, dict[str, float]], None]:
        def on_losses(step: int, losses: dict[str, float]) -> None:
            if self.writer is not None:
                for key, value in losses.items():
                    self.writer.add_scalar(f"{name}/{key}", value, step)
            if step % LOG_EVERY == 0 and not sys.stderr.isatty() and self.accelerator.is_main_process:
                log.info("%s step %d %s", name, step, {k: round(v, 4) for k, v in losses.items()})

        return on_losses

    def _autoencoders(self, which: str) -> None:
        plan = self.config.autoencoder_stage
        sequences = len(self.config.sequences)
        losses = AutoencoderLosses(self.autoencoders[which], plan, which == "b", sequences)
        name = f"autoencoders_{which}"
        stage = self._stage(name, losses, plan.steps, plan.batch, plan.learning_rate, ema=0.0)
        if not stage.finished:
            batches = self.batches("normal" if which == "a" else "mixed")
            stage.run(batches, plan.steps, self._logger(name))

    def _denoiser(self, number: int) -> None:
        config, name = self.config.for_stage(number), self.config.denoiser_stage_names[number]
        plan = config.denoiser_stage
        for ensemble in self.autoencoders.values():  # which no stage of this run need have moved
            ensemble.to(self.accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            ensemble.requires_grad_(False)
        losses = DenoiserLosses(
            self.autoencoders["a"], self.autoencoders["b"], self.condition, self.denoiser, self.schedule, plan,
            diffusion=config.system == "ddmd", seed=config.seed,
        )  # fmt: skip
        stage = self._stage(name, losses, plan.steps, plan.batch, plan.learning_rate, plan.ema)
        files = self._pseudo_mask_files(number)
        edges = [round(share * plan.steps) for share, _ in zip(plan.rounds, files, strict=False)]
        for round_number, edge in enumerate([*edges, plan.steps]):
            if stage.step >= edge:
                continue
            if round_number:
                self._update_pseudo_masks(losses, stage, round_number, files[round_number - 1])
            batches = self.batches("lesions", config)
            stage.run(batches, edge, self._logger(name))
            self._show(losses, stage, batches)
        losses.load_state_dict(stage.averaged())

    def _pseudo_mask_files(self, number: int) -> list[Path]:
        """Where the pseudo-masks of each round of a stage of the denoiser are kept; none with pixel labels."""
        if self.config.labels != "image":
            return []
        stage = f"{number + 1}_" if number else ""
        count = len(self.config.denoiser_stages[number].rounds)
        return [self.out / f"pseudo_masks_{stage}{round_number + 1}.npz" for round_number in range(count)]

    def _update_pseudo_masks(
        self, losses: DenoiserLosses, stage: Stage, round_number: int, kept: Path
    ) -> None:
        """Pseudo-masks of a round by the averaged weights; the weights in training stay as they are.

        The main process makes them and keeps them in the run's folder, where all read them: a run that was
        stopped goes on with those it had.
        """
        if self.accelerator.is_main_process and not kept.exists():
            current = {k: v.clone() for k, v in losses.state_dict().items()}
            losses.load_state_dict(stage.averaged())
            with stage.autocast():
                summary = update_pseudo_masks(losses, self.slices, self.config.seed + round_number)
            losses.load_state_dict(current)
            save_pseudo_masks(self.slices.cases, kept)
            log.info(
                "round %d of pseudo-masks at step %d of %s: %s",
                round_number,
                stage.step,
                stage.plan.name,
                summary,
            )
        self.accelerator.wait_for_everyone()
        load_pseudo_masks(self.slices.cases, kept)
        self.slices.update_masks()

    def _show(self, losses: DenoiserLosses, stage: Stage, batches: BatchMaker) -> None:
        """A few samples with their mask and the network's one-step draw, for TensorBoard."""
        if self.writer is None:
            return
        batch = batches.samples(0, SHOWN)
        image, mask = batch["planes"], batch["mask"]
        losses.eval()
        with stage.autocast():
            drawn = losses.draw(image, self.config.seed).mean(0)
        losses.train()
        middle = self.config.denoiser.context * self.config.denoiser.sequences
        shown = torch.cat(((image[:, middle : middle + 1] + 2) / 5, mask, drawn), 3).clamp(0, 1)
        self.writer.add_images(f"{stage.plan.name}/image, mask, draw", shown.cpu(), stage.step)
