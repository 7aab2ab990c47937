"""The loop. One optimiser step after another, and what has to happen between them."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..errors import AdapterError, CorruptFileError, InvalidInputError, out_of_memory, reason
from .accelerator import Accelerator
from .config import RunConfig
from .log import Log, save_sheet
from .optimizers import build_average, build_optimizer, build_schedule
from .samples import changes
from .saved_state import PICTURES, Training, load_random, save_random
from .state import RunFolder, Saved, check_same_run, read_state
from .step import Step
from .stopping import asked_to_stop, orphan_watch
from .tensor_files import TensorReader, write_tensors

State = dict[str, Tensor]

SHARED_DISK = 60.0
"""Seconds until what one machine writes to a shared disk is seen by the others at the latest."""


class TrainingFailed(AdapterError):
    """The run cannot go on: the loss is no number any more, or nothing can be saved."""


class BatchStream(Protocol):
    """Where batches come from; a function of the micro-step, so that a resumed run sees what it would have seen.

    What is given is passed to the step's ``forward``, on the compute device where it has a method ``to``.
    """

    def batches(self, micro: int, end: int) -> Iterator[Sequence[Any]]: ...


class Watch(Protocol):
    """What is looked at between steps; None means that there is nothing to see. ``module`` is the step that learns."""

    def validate(self, module: Any, /) -> dict[str, float] | None: ...

    def sheet(self, module: Any, state: State, /) -> Image.Image | None: ...


class Results(Protocol):
    """The files that a run leaves for people, besides the states that it resumes from. ``state`` is of what is learned."""

    def checkpoint(self, step: int, state: State, averaged: State | None) -> None: ...

    def finish(self, step: int, state: State) -> None: ...

    def file(self, step: int | None) -> Path:
        """Where the checkpoint of a step lies, or (None) the finished result."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: the steps done, the file of the result, and whether someone asked it to stop before its end.

    ``by_file``: by the stop file, so that no launcher has heard of it.
    """

    step: int
    file: Path
    stopped: bool
    by_file: bool = False


class TrainerState:
    """Counts that belong to the state of a run, and the losses since the last line of its log."""

    def __init__(self) -> None:
        self.step = 0
        self.bad = 0
        self.bad_in_a_row = 0
        self.losses: list[float] = []

    def counts(self) -> dict[str, object]:
        return dict(vars(self))

    def set(self, counts: Mapping[str, object], step: int) -> None:
        """Go on from what was saved after that step. Raises CorruptFileError."""
        whole = [counts.get(name) for name in ("step", "bad", "bad_in_a_row")]
        losses = counts.get("losses")
        if (
            counts.get("step") != step
            or any(type(one) is not int or one < 0 for one in whole)
            or not isinstance(losses, list)
            or not all(isinstance(one, float) for one in losses)
        ):
            raise CorruptFileError(f"the state of step {step} has other counts than were saved")
        vars(self).update({name: counts[name] for name in vars(self)})


class Clock:
    """Seconds per step since it was last asked, without what happens between the steps."""

    def __init__(self) -> None:
        self._started = self._total = 0.0
        self._count = 0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._total += time.perf_counter() - self._started
        self._count += 1

    def each(self) -> float:
        mean = self._total / max(1, self._count)
        self._total, self._count = 0.0, 0
        return round(mean, 5)


def fit(
    config: RunConfig,
    accelerator: Accelerator,
    module: Step,
    stream: BatchStream,
    folder: RunFolder,
    log: Log,
    watch: Watch,
    results: Results,
    pictures: Tensor | None = None,
) -> Outcome:
    """Train ``module.learned`` to ``train.steps``, from the newest state in ``folder`` if there is one that is whole.

    Of ``config`` the sections train, watch and output are read; all of it is kept with the state, and compared. So are the
    digests ``pictures`` of ``samples.digests``: what changed among them is said.

    Raises TrainingFailed when steps keep giving no numbers, when memory ran out (the state before that step is saved, unless
    several processes train) and when nothing can be saved; InvalidInputError for a folder of another run.
    """
    loop = Loop(config, accelerator, module, stream, folder, log, watch, results, pictures)
    loop.go_on()
    return loop.run()


class Loop:
    """A training from where it is to its end. What is in memory between two steps is what a state holds."""

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, module: Step, stream: BatchStream, folder: RunFolder, log: Log,
        watch: Watch, results: Results, pictures: Tensor | None,
    ) -> None:  # fmt: skip
        self.config, self.accelerator, self.module, self.stream = config, accelerator, module, stream
        self.folder, self.log, self.watch, self.results, self.pictures = folder, log, watch, results, pictures
        train = config.train
        self.learned = module.learned
        self.parameters = [p for p in self.learned.parameters() if p.requires_grad]
        plain = build_optimizer(train, module.groups(train.lr))
        self.schedule = build_schedule(train, plain)
        self.model, self.optimizer = accelerator.prepare(module, plain)
        self.average = build_average(train, self.learned)
        self.progress = TrainerState()
        self.training = Training(module, self.average, plain, self.schedule, accelerator.scaler)
        # where the frozen models are split, no process can look at anything without the others
        self.looks: bool = accelerator.is_main_process or train.shard
        self.unsaved: list[Callable[[], None]] = []
        self.updating = False
        """Inside of a step, where the numbers are of no step."""

    def go_on(self) -> None:
        """Read the newest state, if there is one."""
        newest = _newest(self.accelerator, self.folder, self.log)
        if newest is not None:
            changed = check_same_run(self.config, newest, self.accelerator.num_processes)
            self.progress.set(self.training.load(newest.folder), newest.step)
            load_random(newest.folder, self.accelerator.process_index)
            changed = "\n".join(filter(None, [changed, _other_pictures(newest, self.pictures)]))
            text = f"going on after step {self.progress.step} from {newest.folder}"
            self.log.say(text + (changed and f"\n{changed}"))
        self.log.begin(self.progress.step)

    def run(self) -> Outcome:
        """All steps that are left, and the result."""
        train, progress = self.config.train, self.progress
        if self.looks and progress.step == 0 and self.config.watch.validate_every:
            self._validate()
        orphaned, clock = orphan_watch(), Clock()
        batches = self.stream.batches(progress.step * train.accumulate, train.steps * train.accumulate)
        stopped = by_file = False
        failure = ""
        try:
            with asked_to_stop() as asked:
                while progress.step < train.steps and not stopped:
                    self.module.train()
                    clock.start()
                    value, fine = self._step(batches)
                    clock.stop()
                    _guard(progress, fine, value, self.config, self.log)
                    progress.losses.append(value)
                    self.log.tick(progress.step, value)
                    last = progress.step == train.steps
                    wanted = asked() or self.folder.stop_file.exists() or orphaned()
                    stopped = _agree(self.accelerator, wanted) and not last
                    by_file = stopped and self.folder.stop_file.exists()  # before the first process takes it away
                    self._between_steps(clock, last=last, stopped=stopped)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            failure = reason(error)
        if failure:  # outside of except, where the error holds on to all that the step had in memory
            raise self._out_of_memory(failure)
        self._finish(stopped)
        return Outcome(progress.step, self.results.file(progress.step if stopped else None), stopped, by_file)

    # --- one step -----------------------------------------------------------------------------------------------------

    def _step(self, batches: Iterator[Sequence[Any]]) -> tuple[float, bool]:
        """One optimiser step: the mean loss of its micro-steps, and whether the gradients were numbers."""
        train, accelerator = self.config.train, self.accelerator
        loss_sum, fine = 0.0, False
        for _ in range(train.accumulate):
            given = _onto(next(batches), accelerator.device)
            with accelerator.accumulate(self.model):
                loss = self.model(*given)
                accelerator.backward(loss)
                loss_sum = loss_sum + loss.detach()
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, train.clip or math.inf)
                    fine = bool(torch.isfinite(norm))
                    self.updating = True
                    if fine or train.precision == "fp16":  # fp16's own scaler skips overflows and learns from them
                        self.optimizer.step()
                    if fine and self.average is not None:
                        self.average.update_parameters(self.learned)
                    self.schedule.step()
                self.optimizer.zero_grad()
        self.progress.step += 1
        self.updating = False
        return float(loss_sum) / train.accumulate, fine

    def _between_steps(self, clock: Clock, *, last: bool, stopped: bool) -> None:
        """What is due: a line of the log, a validation, a sheet, a checkpoint, a state."""
        out, seen, step, log = self.config.output, self.config.watch, self.progress.step, self.log
        if last or stopped or step % seen.log_every == 0:
            mean = _mean(self.accelerator, self.progress.losses)
            rate = self.schedule.get_last_lr()[0]
            log.event("step", step, loss=mean, lr=rate, seconds_per_step=clock.each())
            self.progress.losses.clear()
            self.unsaved = [save for save in self.unsaved if not self._try_to(save)]
        if self.looks and (_due(step, seen.validate_every) or last):
            self._validate()
        if self.looks and (_due(step, seen.sample_every) or (last and seen.sample_every)):
            together = self.config.train.shard
            _draw(log, self.folder, step, lambda: self.watch.sheet(self.module, self._best()), together=together)
        if _due(step, out.save_every) or last or stopped:
            self._save(self._checkpoint)
        if _due(step, out.state_every) or last or stopped:
            self._save(self._state)

    def _validate(self) -> None:
        together = self.config.train.shard
        _look(
            self.accelerator, self.log, self.progress.step, lambda: self.watch.validate(self.module), together=together
        )

    # --- what is saved ------------------------------------------------------------------------------------------------

    def _raw(self) -> State:
        return self.learned.state_dict()

    def _best(self) -> State:
        return self._raw() if self.average is None else self.average.module.state_dict()

    def _checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            averaged = None if self.average is None else self._best()
            self.results.checkpoint(self.progress.step, self._raw(), averaged)
        self.accelerator.wait_for_everyone()

    def _state(self) -> None:
        accelerator, step = self.accelerator, self.progress.step
        place = self.folder.unfinished(step)
        if accelerator.is_main_process:
            self.training.save(place, self.progress.counts())
            if self.pictures is not None:
                write_tensors(place / PICTURES, {"digests": self.pictures})
        save_random(place, accelerator.process_index)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            world = accelerator.num_processes
            self.folder.finish(step, {"config": self.config.as_dict(), "step": step, "processes": world})
        accelerator.wait_for_everyone()

    def _save(self, save: Callable[[], None]) -> None:
        """Now, or when there is room."""
        if not self._try_to(save):
            self.unsaved.append(save)

    def _try_to(self, save: Callable[[], None]) -> bool:
        """A full disk should not cost the training that is in memory: say it, go on, try again later."""
        try:
            save()
            return True
        except Exception as error:  # torch, safetensors and the system each have their own kinds
            if self.accelerator.num_processes > 1:
                raise
            step = self.progress.step
            self.log.say(f"step {step} could not be saved ({error}); training goes on and tries again")
            self.log.event("save failed", step, error=str(error))
            self.folder.prepare_again()
            return False

    # --- its end ------------------------------------------------------------------------------------------------------

    def _out_of_memory(self, why: str) -> TrainingFailed:
        """Save what is whole, and say how to go on."""
        self.optimizer.zero_grad()
        _let_go()
        step, alone = self.progress.step, self.accelerator.num_processes == 1 and not self.updating
        saved = (
            f"step {step} is saved"
            if alone and self._try_to(self._state)
            else "the newest saved state is from before it"
        )
        return TrainingFailed(
            f"memory ran out after step {step} ({why}); {saved}, and the same command goes on from there: close other "
            "programs first, or begin in another output.folder with train.checkpointing = true or a smaller train.batch"
        )

    def _finish(self, stopped: bool) -> None:
        step, main = self.progress.step, self.accelerator.is_main_process
        try:
            for save in self.unsaved:
                save()
            if main and not stopped:
                self.results.finish(step, self._best())
        except Exception as error:
            raise TrainingFailed(
                f"the result of step {step} could not be saved ({error}); make room in {self.folder.path} and start the training "
                "again: it goes on after its newest state"
            ) from error
        if main:
            self.folder.stop_file.unlink(missing_ok=True)
            self.log.plot()
            file = self.results.file(step if stopped else None)
            self.log.event("stopped" if stopped else "done", step, file=str(file), bad_steps=self.progress.bad)
        self.accelerator.wait_for_everyone()


def _newest(accelerator: Accelerator, folder: RunFolder, log: Log) -> Saved | None:
    """The state to go on from, the same for all processes; the first one looks which is whole, and says which are not.

    Raises InvalidInputError where they do not see the first one's: each would train another part of the run.
    """
    found: Saved | None = None
    failure: AdapterError | None = None
    if accelerator.is_main_process:
        try:
            found, problems = folder.newest()
            for problem in problems:
                log.say(f"{problem}: it was put aside, and the training goes on from the state before it")
        except AdapterError as error:
            failure = error
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        device = accelerator.device
        chosen = -2 if failure is not None else -1 if found is None else found.step
        told: Any = broadcast(torch.tensor(chosen, device=device))
        wanted = int(told)
        if wanted == -2:
            raise failure or InvalidInputError(f"the first process cannot go on from {folder.path}; see its message")
        end = time.monotonic() + SHARED_DISK

        def seen() -> int:
            steps = [step for step, _ in folder.states()]
            return wanted if wanted in steps else max(steps, default=-1)

        while seen() != wanted and time.monotonic() < end:
            time.sleep(0.2)
        all_seen = accelerator.gather(torch.tensor([seen()], device=device)).tolist()
        if len(set(all_seen)) > 1:
            named = ", ".join("no state" if one < 0 else f"step {one}" for one in dict.fromkeys(all_seen))
            raise InvalidInputError(
                f"the processes see different states in {folder.path} ({named}); output.folder must be one folder, shared by all "
                "machines"
            )
        if wanted >= 0 and found is None:
            found = read_state(wanted, dict(folder.states())[wanted])
    elif failure is not None:
        raise failure
    return found


def _other_pictures(saved: Saved, pictures: Tensor | None) -> str:
    """What changed among the pictures since a state, in words; empty for nothing, and for states that noted none."""
    if pictures is None or PICTURES not in saved.files:
        return ""
    file = TensorReader(saved.folder / PICTURES)
    try:
        return changes(file.read("digests"), pictures)
    finally:
        file.close()


def _onto(given: Sequence[Any], device: torch.device) -> list[Any]:
    return [one.to(device) if hasattr(one, "to") else one for one in given]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _guard(progress: TrainerState, fine: bool, loss: float, config: RunConfig, log: Log) -> None:
    """Count steps that gave no number; their update was skipped."""
    if fine:
        progress.bad_in_a_row = 0
        return
    progress.bad += 1
    progress.bad_in_a_row += 1
    # fp16 starts with a scale that is meant to overflow a few times
    limit = config.train.bad_steps * (10 if config.train.precision == "fp16" else 1)
    log.event("bad step", progress.step, loss=str(loss))
    if progress.bad_in_a_row >= limit:
        raise TrainingFailed(
            f"steps {progress.step - limit + 1} to {progress.step} gave gradients that are no numbers (last loss {loss}); "
            "the newest saved state is from before. Try a lower train.lr, train.clip = 1, or train.precision bf16"
        )


def _agree(accelerator: Accelerator, asked: bool) -> bool:
    """Whether any process was asked to stop; all must leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return asked
    flag = torch.tensor([float(asked)], device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum") > 0)


def _mean(accelerator: Accelerator, losses: list[float]) -> float:
    """Mean over the steps since the last line of the log, and over all processes."""
    mean = sum(losses) / len(losses)
    if accelerator.num_processes == 1:
        return mean
    return float(accelerator.reduce(torch.tensor(mean, device=accelerator.device), "mean"))


def _look(
    accelerator: Accelerator, log: Log, step: int, validate: Callable[[], dict[str, float] | None], *, together: bool
) -> None:
    """A validation that finds no memory is reported and costs no training; the processes of a split model end together."""
    try:
        with accelerator.autocast():
            values = validate()
    except (MemoryError, RuntimeError) as error:
        if together or not out_of_memory(error):
            raise
        log.say(f"no validation at step {step}: memory ran out ({reason(error)})")
        return
    if values is not None:
        log.event("validation", step, **values)
        log.plot()


def _draw(log: Log, folder: RunFolder, step: int, draw: Callable[[], Image.Image | None], *, together: bool) -> None:
    """A sheet that fails (no memory, no disk, a model folder that is gone) is reported and costs no training."""
    try:
        sheet = draw()
        if sheet is None or not log.active:
            return
        path = save_sheet(sheet, folder.path, step)
    except (MemoryError, RuntimeError, OSError, AdapterError) as error:
        if together:
            raise
        log.say(f"no sample sheet at step {step}: {reason(error)}")
        return
    import numpy as np

    log.picture("sheet", step, np.asarray(sheet))
    log.event("sheet", step, file=str(path))


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
