"""`moesaic`: compose a config, refuse it or run it, and say in one line what went wrong.

Only the standard library is imported with this module, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesaic.app.groups import conf_folder, config_folders, config_groups
from moesaic.app.help import help_text
from moesaic.config.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.runs.engine import StageState

__all__ = ["DONE", "FAILED", "INTERRUPTED", "REFUSED", "Application", "main", "run"]

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, kw_only=True, slots=True)
class Application:
    """What the command line drives: where its configs are, and what is done with one."""

    conf: Path
    configure: Callable[[dict[str, Any]], Any]  # plain tree -> checked config; ConfigError where it is wrong
    run: Callable[[Any, dict[str, Any]], Path]  # checked config, plain tree -> folder of the record
    plan: Callable[[Any], list[StageState]]  # checked config -> its stages, for a dry run


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one job of a command ended."""

    job: str
    state: Literal["done", "failed", "refused"]


class _StopGrid(BaseException):
    """Ends a multirun at its first failure; not an Exception, which Hydra would keep until all jobs have run."""


def main() -> None:
    """Run the command line of this process and exit with its code."""
    sys.exit(run(sys.argv[1:], _moesaic()))


def run(arguments: Sequence[str], application: Application) -> int:
    """Do what `arguments` ask for and return the exit code: 0 done, 1 failed, 2 refused, 130 interrupted."""
    groups = config_groups(config_folders(application.conf, arguments))
    if "--help" in arguments or "-h" in arguments:
        print(help_text(groups))
        return DONE
    if "--version" in arguments:
        print(f"moesaic {metadata.version('moesaic')}")
        return DONE
    jobs = _Jobs(application, groups)
    try:
        _hydra(arguments, jobs)
    except _StopGrid:
        _say("stopped at the first failure (keep_going=false)")
    except KeyboardInterrupt:
        _say("interrupted; the same command continues where it stopped")
        return INTERRUPTED
    except Exception as error:
        # What happens outside the jobs of this process arrives here: composition, and jobs of a launcher's workers.
        jobs.note("moesaic", ConfigError(str(error)) if isinstance(error, ValueError) else error, {})
    return jobs.exit_code()


def _hydra(arguments: Sequence[str], jobs: _Jobs) -> None:
    import hydra

    from moesaic.app.compose import CONFIG_NAME, HYDRA_VERSION_BASE, with_default_keys

    conf = str(jobs.application.conf)
    start = hydra.main(version_base=HYDRA_VERSION_BASE, config_path=conf, config_name=CONFIG_NAME)(jobs)

    def attempt(given: list[str]) -> None:
        sys.argv = [sys.argv[0], *given]
        start()

    # Without it Hydra prints errors in its own words and exits with 1 for all of them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with_default_keys(arguments, attempt)


@dataclass
class _Jobs:
    """The task that Hydra calls once per job, and how the jobs ended."""

    application: Application
    groups: Collection[str]
    outcomes: list[Outcome] = field(default_factory=list)
    process: int = field(default_factory=os.getpid)

    def __call__(self, cfg: Any) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra_config = HydraConfig.get()
        multirun = hydra_config.mode == RunMode.MULTIRUN
        job = " ".join(override.lstrip("+") for override in hydra_config.overrides.task) or "the default config"
        plain: dict[str, Any] = {}
        try:
            if multirun:
                _say(f"job {hydra_config.job.num}: {job}")
            self._work(cfg, plain)
        except Exception as error:
            if os.getpid() != self.process:
                raise  # a launcher's worker: the error travels to the process that reports
            self.note(job, error, plain)
            if multirun and not cfg.get("keep_going", True):
                raise _StopGrid from error
            if multirun:
                _say("going on with the next job (keep_going=true)")
        else:
            self.outcomes.append(Outcome(job=job, state="done"))

    def _work(self, cfg: Any, plain: dict[str, Any]) -> None:
        from moesaic.app.compose import plain_tree

        plain.update(plain_tree(cfg))
        config = self.application.configure(plain)
        if config.dry_run:
            _print_plan(self.application.plan(config))
        else:
            print(f"record: {self.application.run(config, plain)}", flush=True)

    def note(self, job: str, error: Exception, plain: dict[str, Any]) -> None:
        """Tell at once what went wrong, and keep it for the exit code."""
        from moesaic.app.refusal import REFUSALS, refusal
        from moesaic.runs.engine import StageFailedError

        cause = error.__cause__ if isinstance(error, StageFailedError) else error
        if isinstance(cause, REFUSALS):
            _say(f"refused: {refusal(cause, self.groups)}")
            self.outcomes.append(Outcome(job=job, state="refused"))
            return
        if isinstance(error, StageFailedError):
            path, message = error.traceback_path, str(error)
        else:
            path, message = _write_traceback(error, plain), f"unexpected {type(error).__name__}: {error}"
        _say(message + (f"\n  traceback: {path}" if path else ""))
        self.outcomes.append(Outcome(job=job, state="failed"))

    def exit_code(self) -> int:
        """Return the code for all jobs together; several get a summary first, if not all are done."""
        bad = [outcome for outcome in self.outcomes if outcome.state != "done"]
        if bad and len(self.outcomes) > 1:
            _say(f"{len(self.outcomes) - len(bad)} of {len(self.outcomes)} jobs done; not done:")
            for outcome in bad:
                print(f"  {outcome.state:<8} {outcome.job}", file=sys.stderr)
        if any(outcome.state == "failed" for outcome in bad):
            return FAILED
        return REFUSED if bad else DONE


def _print_plan(states: Sequence[StageState]) -> None:
    for each in states:
        print(f"{each.state:<12} {each.title}" + (f"  ({each.note})" if each.note else ""))
    done = sum(each.state == "done" for each in states)
    print(f"dry run: {done} of {len(states)} stages are done, nothing was computed", flush=True)


def _write_traceback(error: Exception, plain: dict[str, Any]) -> Path | None:
    """Keep the traceback of a bug beside the runs, or in the temporary folder where that cannot be."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    text = "".join(traceback.format_exception(error))
    runs = plain.get("paths", {}).get("runs")
    for folder in [*([Path(runs) / "crashes"] if isinstance(runs, str) else []), Path(tempfile.gettempdir())]:
        path = folder / f"moesaic-{stamp}-{os.getpid()}.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return path.absolute()
        except OSError:
            continue
    return None


def _say(message: str) -> None:
    print(f"moesaic: {message}", file=sys.stderr, flush=True)


def _moesaic() -> Application:
    """The real thing; its parts are imported when they are needed, after Hydra has accepted the command line."""

    def configure(plain: dict[str, Any]) -> Any:
        from moesaic.app.schema import MoesaicConfig
        from moesaic.config.strict import strict_object

        return strict_object(MoesaicConfig, plain)

    def run_it(config: Any, plain: dict[str, Any]) -> Path:
        from moesaic.app.pipeline import run_experiment

        return run_experiment(config, plain)

    def plan(config: Any) -> list[StageState]:
        from moesaic.app.pipeline import plan_experiment

        return plan_experiment(config)

    return Application(conf=conf_folder(), configure=configure, run=run_it, plan=plan)
