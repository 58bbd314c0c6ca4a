"""What a run finds out about its adapter between the steps: validation pictures, and what is read from
them."""

from collections.abc import Callable

from dreambooth.runtime.graphs import Graphs
from dreambooth.training import metrics
from dreambooth.training.best import BestAdapter
from dreambooth.training.frozen_models import FrozenModels
from dreambooth.training.judging import Images
from dreambooth.training.run_meter import RunMeter
from dreambooth.training.run_report import RunReport
from dreambooth.training.saving import Saver
from dreambooth.training.start import Start
from dreambooth.training.trainables import Trainables
from dreambooth.training.validation import ValidationPictures


class Evaluation:
    """Everything that is measured of the adapter at some steps. It shifts no random number of the training
    and changes no weight."""

    def __init__(
        self,
        start: Start,
        frozen: FrozenModels,
        trainables: Trainables,
        saver: Saver,
        graphs: Graphs,
        check: Callable[[], None],
        *,
        steps_per_epoch: int,
        max_steps: int,
    ):
        """`graphs` are those of the step; drawing needs their memory. `check` is called between sampling
        steps; it raises Stop if the run must end."""
        self.graphs, self.steps_per_epoch, self.max_steps = graphs, steps_per_epoch, max_steps
        self.pictures = ValidationPictures(start, frozen, trainables, check)
        self.judging, self.is_judged, self.peers = start.judging, start.judge_plan is not None, start.peers
        self.starts_from_base, self.frozen = not start.init_adapter, frozen
        self.trains_text = start.options.text.train_text_encoder
        self.meter = RunMeter(start, frozen, trainables, check, max_steps)
        self.checkpointing_steps = start.options.run.checkpointing_steps
        self.report = RunReport(start, max_steps)
        self.saver, self.best = saver, BestAdapter(start, saver)
        self.stops_when_worse = start.options.meter.stop_when_worse
        self.is_over = False
        """Whether --stop_when_worse ends the run before its next step. The same on all processes."""

    def is_due(self, step: int) -> bool:
        """Whether something is measured after `step` steps."""
        return self.meter.is_due(step) or self._draws(step)

    def _draws(self, step: int) -> bool:
        """Whether pictures are drawn after `step` steps. After the last step, `finish` draws them."""
        return step < self.max_steps and self.pictures.is_due(step, steps_per_epoch=self.steps_per_epoch)

    def begin(self, step: int, progress: metrics.Progress) -> None:
        """Measure what is due before the first step of this start, after `step` steps."""
        self.report.begin()
        self.meter.begin(step, progress)
        if step > 0:  # best/ goes back to this step
            self._choose(step, progress)
        # a run that is resumed at a step may have ended while its pictures were drawn or judged
        is_unjudged = self.judging is not None and not progress.is_evaluated(step, "judge")
        is_incomplete = is_unjudged or (self._draws(step) and not self.pictures.are_written(step))
        if step == 0 or self.peers.broadcast(is_incomplete):
            self.after_step(step, progress)
            if self.is_due(step):
                progress.end_phase("first evaluation", step)

    def after_step(self, step: int, progress: metrics.Progress) -> None:
        """Measure what is due after `step` steps, counted from 0: 0 is before the first step."""
        self.meter.measure(step, progress)
        if self.meter.is_due(step):
            self._choose(step, progress)
        if self._draws(step):
            self.graphs.forget()
            images = self.pictures.draw_current(step, progress)
            if self.is_judged:
                self._judge(step, images, self._base_images(step, images, progress), progress)
        if self.is_due(step) or step % self.checkpointing_steps == 0:
            self.report.update(always=step == 0)

    def _choose(self, step: int, progress: metrics.Progress) -> None:
        """Choose the best step so far, and find out whether the run is over."""
        self.best.update(step, progress)
        if self.stops_when_worse:
            self.is_over = self.best.is_worse()

    def finish(self, step: int, progress: metrics.Progress) -> None:
        """Measure the finished adapter, after `step` steps. The trained one is removed from the models."""
        self.graphs.forget()
        images = self.pictures.draw_finished(self.saver, step, progress)
        if images:
            self._judge(step, images, None, progress)
        self.best.say()
        self.report.say()

    def _judge(
        self, step: int, images: Images, base_images: Images | None, progress: metrics.Progress
    ) -> None:
        """Judge the pictures drawn after `step` steps, on the main process. An earlier start of the run may
        have done so. A picture that a judge has no finite embedding of costs the scores of that step, with a
        warning."""
        if self.judging is None or progress.is_evaluated(step, "judge"):
            return
        try:
            self.judging.judge(step, images, base_images, progress)
        except FloatingPointError as error:
            self.peers.say(f"warning: the pictures of step {step} have no scores: {error}")

    def _base_images(self, step: int, images: Images, progress: metrics.Progress) -> Images | None:
        """The pictures of the judges' own prompts by the base; None if they were judged before, or if the
        text encoders were trained and freed."""
        is_needed = self.judging is not None and not self.judging.has_base(progress)
        if not self.peers.broadcast(is_needed) or (self.trains_text and self.frozen.parts.text is None):
            return None
        return images if step == 0 and self.starts_from_base else self.pictures.draw_base()
