"""Steps as Ray tasks."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray

from loram.errors import UserError
from pipelines.execute import run
from pipelines.place import forget_peak
from pipelines.step import Metrics, Step


def ray_launch(
    step: Step, inputs: dict[str, Any], out: Path, work: Path, place: Any
) -> "Future[Metrics]":
    """Run the step as a Ray task with its cpus and gpus; cancelling the Future kills the task.

    A lost worker is replaced once, also one that Ray killed for its memory: the second attempt
    goes on from `work`. What the step raised is what the Future raises; a UserError is found below
    any of Ray's wrappings.
    """
    # Given here and not to `options`, GPUs make Ray end the worker with the task: one that waits
    # for the next would keep what torch has allocated, and its choice of a GPU.
    task = ray.remote(num_cpus=step.cpus, num_gpus=step.gpus, max_retries=1)(_alone).options(
        name=step.slug,
        # A trial of a sweep has a placement group without CPUs, in which nothing else would fit.
        scheduling_strategy="DEFAULT" if step.cpus or step.gpus else None,
    )
    ref = task.remote(step, inputs, out.absolute(), work.absolute(), place)
    future: Future[Metrics] = Future()

    def settle(answer: "Future[Metrics]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        error = answer.exception()
        if error is None:
            future.set_result(answer.result())
        else:
            future.set_exception(_bare(error))

    def stop(cancelled: "Future[Metrics]") -> None:
        if cancelled.cancelled() and ray.is_initialized():
            ray.cancel(ref, force=True)

    future.add_done_callback(stop)
    ref.future().add_done_callback(settle)
    return future


def _alone(step: Step, *rest: Any) -> Metrics:
    """Run the step in a worker that may have run others: the most memory it held is its own, and
    torch, which took its number of threads from the first of them, uses the CPUs of this one."""
    forget_peak()
    if step.cpus:
        import torch  # steps without CPUs do without

        torch.set_num_threads(int(step.cpus))
    return run(step, *rest)


def _bare(error: BaseException) -> BaseException:
    """The step's own exception: a UserError if there is one below, else what the task raised, or of
    a training what its worker did."""
    pending, seen = [error], set()
    while pending:
        inner = pending.pop()
        if isinstance(inner, UserError):
            return UserError(str(inner.args[0]))
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        below = [getattr(inner, name, None) for name in ("__cause__", "cause", "_base_exc")]
        below += getattr(inner, "worker_failures", {}).values()  # of ray.train.WorkerGroupError
        below.append(getattr(inner, "controller_failure", None))  # of ray.train.ControllerError
        pending += [link for link in below if isinstance(link, BaseException)]
    return _unwrapped(error)


def _unwrapped(error: BaseException) -> BaseException:
    """What Ray and Ray Train wrapped, whose own texts are tracebacks."""
    inner = [getattr(error, name, None) for name in ("cause", "_base_exc", "controller_failure")]
    inner += getattr(error, "worker_failures", {}).values()
    found = next((link for link in inner if isinstance(link, BaseException)), None)
    return _unwrapped(found) if found else error
