"""A run that is finished: its result again, or a test set that it was not scored on."""

from functools import partial

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.components import Given
from ddp_sgd.engine.rank_consistency import mark_training_set
from ddp_sgd.engine.reading import Reading
from ddp_sgd.engine.result import RunResult
from ddp_sgd.engine.resume import ResumePoint, refuse_data_of_another_run
from ddp_sgd.engine.train_state import hand_over, refuse_other_parts
from ddp_sgd.report.reporter import report_end
from ddp_sgd.report.run_folder import RunFolder


def repeat_result(
    result: RunResult,
    resume_point: ResumePoint,
    given: Given,
    reading: Reading,
    runtime: Runtime,
    folder: RunFolder | None,
) -> RunResult:
    """Return the result of a run that is finished; a model that was given gets its weights.

    Args:
        result: How the run ended.
        resume_point: What is left of it.
        given: What the caller brings today.
        reading: How samples are read.
        runtime: This process.
        folder: The run folder, on the rank that has it.

    Raises:
        DataError: The last checkpoint cannot be read.
        RefusedError: The run had other data, another loss or another model.
    """
    refuse_other_parts(resume_point.header, given.train_set, given.loss)
    marks_of = partial(mark_training_set, given.train_set, reading)
    refuse_data_of_another_run(resume_point, marks_of, runtime)
    if given.model is not None:
        hand_over(given.model, resume_point.file, runtime)
    report_end(result.as_row(), folder)
    return result


def lacks_test(resume_point: ResumePoint, config: RunConfig, given: Given) -> bool:
    """Whether a run that was finished before has a test set by now, and was not scored on one.

    Where its weights are lost, nothing can be scored, and its result is all there is.

    Args:
        resume_point: What is left of the run.
        config: Description of the run, of today.
        given: What the caller brings today.
    """
    has_test_set = given.test_set is not None or config.data.test is not None
    is_tested = resume_point.ending is not None and "test/count" in resume_point.ending.scores
    return has_test_set and not is_tested and resume_point.header is not None
