"""resfeat extract"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from setproctitle import setproctitle

from resfeat.cli import GOES_ON, OWN_PROCESS, config, leave, options
from resfeat.cli.failed import TOO_MANY_FAILED
from resfeat.cli.options import option, switch
from resfeat.cli.progress import Bar, JsonLines, Lines, Quiet, tell
from resfeat.cli.signals import StopSignals
from resfeat.errors import ResfeatError, Stopped, public, public_text
from resfeat.spec import ExtractSpec, RuntimeOptions

if TYPE_CHECKING:
    from resfeat.plan import Changes
    from resfeat.reporting import Metrics, Preview, Progress, Report

EXAMPLES = """\b
Examples:
  resfeat extract photos -o embeddings
      All images below photos/, ResNet-50, on every GPU here, or on the CPU.
  resfeat extract photos -o embeddings
      The same again: resumes a run that was killed or stopped.
  resfeat extract photos -o embeddings --retry-failed
      Does the failed images again; all other rows stay.
  resfeat extract photos -o embeddings --update
      Lists again: new and changed images are embedded, rows of those that are gone go.
  resfeat extract photos -o embeddings --update --dry-run
      What that would do, and how long it would take.
  resfeat extract /data/photos -o /data/embeddings --partition 2/4
      The second of four runs, on any hosts, that share the work; --partition auto in a Slurm array.
  resfeat extract s3://bucket/photos -o s3://bucket/embeddings
      From and to an object store (s3://, gs://, az://); AWS_*, GOOGLE_* or AZURE_* variables hold
      your credentials.
  resfeat extract 'shards/*.tar' -o embeddings --keep cls,json
      Tar shards as WebDataset has them; what travels beside an image becomes columns.
  resfeat extract images.csv -o embeddings --uri-column url --keep caption
      A table of paths or addresses; the captions are stored with the embeddings.
  resfeat extract 'data/train-*.parquet' -o embeddings --id-column key
      Parquet that holds the images themselves.
  resfeat extract train val -o embeddings --model resnet18 --label-from parent
      Two folders in one dataset; the name of each image's folder becomes its label.
  resfeat extract photos -o embeddings --weights finetuned.pth --workers 0
      Your own checkpoint; in this process, without Ray.
  resfeat extract photos -o embeddings --layers layer3,avgpool --pool gem --normalize
      Two embeddings per image in one pass, GeM-pooled, of unit length.
  resfeat extract photos -o embeddings --model timm:convnext_tiny --precision bf16
      A network of timm in bf16, first compared with fp32 on a sample of the images.
  resfeat extract /data/photos -o /data/embeddings --address auto --workers 16
      On the Ray cluster that runs here; all its machines see /data.
  RESFEAT_UPDATE=1 resfeat extract --config job.toml
      As a job wants it: job.toml has sources = ["photos"], output = "embeddings", and options.

\b
Exit codes: 0 finished; 3 finished, but more images failed than --max-error-rate allows;
1 the run failed; 2 wrong usage; 130 or 143 stopped by SIGINT or SIGTERM.
Whatever ended a run, the same command resumes it.
"""


@click.command(epilog=EXAMPLES, context_settings={"auto_envvar_prefix": config.PREFIX})
@click.argument("sources", metavar="SRC...", nargs=-1, required=True, envvar="RESFEAT_SOURCES")
@option(
    "-o", "--output", metavar="OUT", required=True, help="Dataset folder; resumed if it exists."
)
@config.option
@option(
    "--min-parity",
    type=float,
    help="Stop if a sample's cosine to fp32 is lower.  [default: 0.999, with int8 0.99]",
)
@options.listing
@options.features
@options.placement
@options.count("--workers", help="Ray workers; 0 runs in this process, without Ray.")
@option("--address", help="A running Ray cluster: auto or HOST:PORT.")
@option(
    "--shard-size",
    type=int,
    help="Images in a shard, the unit of retry and commit.  [default: 4096, less for few images]",
)
@option(
    "--max-error-rate", default=0.05, help="Share of failed images above which the exit code is 3."
)
@switch("retry-failed", help="Also do the failed images again; other rows stay.")
@switch("update", help="List again, and bring OUT to what the sources hold now.")
@option(
    "--max-gone", default=0.1, help="Share of the images whose removal by --update is no mishap."
)
@option(
    "--partition",
    metavar="I/N",
    help="Do one of N shares, beside other runs; auto asks Slurm, and auto/N Kubernetes.",
)
@switch("dry-run", help="Say what would be done, and write nothing.")
@switch("quiet", help="Print errors only.")
@switch("verbose", help="Also print where the time went.")
@switch("log-json", help="Print progress and the report as JSON lines.")
@option(
    "--metrics",
    metavar="FILE.prom",
    help="Write Prometheus text there, for node_exporter's textfile collector, while it runs too.",
)
@click.pass_context
def extract(context: click.Context, /, **choices: Any) -> None:
    """Embed all images below SRC... and write Parquet to OUT.

    Every image becomes one row: in OUT/embeddings, or in OUT/failures with the reason. After a
    crash or a stop, give the same command: it resumes, and does no committed shard again.

    Every option may come from the environment, as RESFEAT_MODEL or RESFEAT_MAX_ERROR_RATE, or from
    the file of --config, as model or max-error-rate; so may SRC..., as RESFEAT_SOURCES or sources,
    and OUT. The command line counts first, then the environment, then the file. Paths are relative
    to the folder that you are in. The run's report says what counted, and where it came from.
    """
    choices["runtime"] = RuntimeOptions(**options.pick(choices, RuntimeOptions))
    spec = ExtractSpec(**options.pick(choices, ExtractSpec))
    if context.obj is OWN_PROCESS:
        # What `ps` and `top` show; the arguments may hold secrets. Without a blank in what becomes
        # the process's name: Slurm's proctrack/linuxproc does not find such a one to end it.
        setproctitle(f"resfeat-extract {public(spec.output)}")
        # Ray imports it, and it warns of an extra that is not installed. The filter that should
        # hide this is lost where another thread, which imports torch, puts back an older list.
        warnings.filterwarnings("ignore", module=r"urllib3\.")
    talk = _talk(context)
    displays: dict[str | None, type[Lines]] = {"quiet": Quiet, "log_json": JsonLines}
    show = displays.get(talk, Bar if sys.stderr.isatty() else Lines)
    with StopSignals() as signals, show() as display:
        display.step("starting")
        from resfeat.runtimes.importing import keep_pandas_out  # brings NumPy

        keep_pandas_out()
        work = _foreseen if choices["dry_run"] else _extracted
        try:
            code = work(context, spec, display, signals)
        except ResfeatError as error:
            code = signals.exit_code if isinstance(error, Stopped) else error.exit_code
            if talk == "log_json":
                tell("error", text=public_text(str(error)), exit_code=code)
            if not isinstance(error, Stopped):
                raise
            click.echo(str(error), err=True)
    if context.obj is GOES_ON and signals.received():
        code = signals.exit_code  # the run is done, but whoever called is to stop, too
    leave(context, code)


def _foreseen(
    context: click.Context, spec: ExtractSpec, display: Lines, signals: StopSignals
) -> int:
    """Say what would be done; gives the exit code."""
    from resfeat import extraction

    preview = extraction.preview(
        spec, on_step=display.step, on_progress=display.show, stopping=signals.received
    )
    display.end()
    _foretell(preview, as_json=_talk(context) == "log_json")
    return 1 if preview.refusal else 0


def _extracted(
    context: click.Context, spec: ExtractSpec, display: Lines, signals: StopSignals
) -> int:
    """Do it, and say what was done; gives the exit code."""
    from resfeat import extraction
    from resfeat.reporting import Metrics

    file = context.params["metrics"]
    metrics = Metrics(file, spec.output, spec.partition) if file else None

    def show(progress: Progress) -> None:
        display.show(progress)
        if metrics:
            metrics.show(progress)

    report, code = None, ResfeatError.exit_code
    try:
        report = extraction.extract(
            spec, on_note=display.note, options=config.in_force(context), on_step=display.step,
            on_progress=show, stopping=signals.received,
        )  # fmt: skip
        code = _exit_code(report, spec, signals)
    except ResfeatError as error:
        code = signals.exit_code if isinstance(error, Stopped) else error.exit_code
        raise
    finally:
        if metrics:
            _finish(metrics, code, report)
    display.end()
    talk = _talk(context)
    if talk == "log_json":
        tell("report", **report.as_dict())
    elif talk != "quiet":
        _tell(report, verbose=talk == "verbose")
    if code == TOO_MANY_FAILED:
        more = f"more than --max-error-rate {spec.max_error_rate:.1%}"
        told = f"{report.error_rate:.1%} of the images failed, {more}"
        click.echo(f"Error: {told}; see {report.output}/failures", err=True)
    return code


def _exit_code(report: Report, spec: ExtractSpec, signals: StopSignals) -> int:
    if report.status == "interrupted":
        return signals.exit_code
    return TOO_MANY_FAILED if report.error_rate > spec.max_error_rate else 0


def _finish(metrics: Metrics, code: int, report: Report | None) -> None:
    """Write down how the run ended. It has, whatever becomes of the file."""
    try:
        metrics.end(code, report)
    except OSError as error:
        click.echo(f"Note: --metrics could not be written: {error}", err=True)


def _talk(context: click.Context) -> str | None:
    """Which way to talk was asked for: on the command line, or else by a variable, or the file."""
    asked = [name for name in ("log_json", "quiet", "verbose") if context.params[name]]
    sources = {
        name: context.get_parameter_source(name) or ParameterSource.DEFAULT for name in asked
    }
    return min(asked, key=sources.__getitem__, default=None)


def _foretell(preview: Preview, *, as_json: bool) -> None:
    if as_json:
        tell("preview", **preview.as_dict())
        return
    if preview.update is not None:
        click.echo(_changes(preview.update))
    time = "how long is not known yet: `resfeat bench SRC` measures the speed"
    if preview.rate and preview.seconds is not None:
        time = f"about {_duration(preview.seconds)} at the last run's {preview.rate:,.1f} images/s"
    click.echo(
        f"To do: {preview.images:,} of {preview.items:,} images in {preview.shards:,} shards of "
        f"{preview.output}" + (f", {time}" if preview.images else "")
    )
    if preview.refusal:
        click.echo(f"Error: {preview.refusal}", err=True)


def _changes(changes: Changes) -> str:
    counts = ", ".join(f"{count:,} {name}" for name, count in vars(changes).items())
    return f"Update: {counts}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _tell(report: Report, *, verbose: bool) -> None:
    if report.images:
        click.echo(
            f"This run: {report.images:,} images in {report.seconds:,.1f} s, "
            f"{report.images_per_second:,.1f} images/s after {report.start_seconds:.1f} s of "
            "start-up" + (f"; {report.verdict}" if report.verdict else "")
        )
    elif not report.shards_left:
        more = "; --update looks for images that are new or have changed"
        is_whole = report.update is None and report.partition is None  # else it has, or may not
        click.echo(f"This run: nothing was left to do{more if is_whole else ''}")
    if report.update is not None:
        click.echo(f"{_changes(report.update)}, {report.images_failed:,} failed")
    if verbose:
        where = ", ".join(f"{name} {value}" for name, value in report.engine.items())
        busy = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.stages.items())
        click.echo(f"Where: {where}\nBusy seconds, over all threads: {busy}")
    if deaths := report.engine.get("worker_deaths"):
        lost = _duration(report.engine["lost_seconds"])
        click.echo(f"Workers that died and were replaced: {deaths}, with {lost} of their work")
    if taken_over := report.engine.get("taken_over"):
        click.echo(f"Shards that a quicker worker took over: {taken_over}")
    if report.changed:
        changed = f"{report.changed:,} images, taken as they are now"
        click.echo(f"Changed since they were listed: {changed}")
    if report.skipped:
        click.echo(f"Passed over, not images: {_counts(report.skipped)}")
    if report.failed:
        click.echo(
            f"Failed: {_counts(report.reasons)}; see {report.output}/failures; --retry-failed "
            "does them once more"
        )
    verb = "Stopped, the same command goes on" if report.status == "interrupted" else "Finished"
    click.echo(
        f"{verb}: {report.embedded:,} embedded and {report.failed:,} failed "
        f"of {report.items:,} images in "
        + (f"partition {report.partition} of " if report.partition else "")
        + report.output
    )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())
