"""The command line. Errors are told in a few lines; exit code 2 means a configuration to mend, 1 anything else."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

import raycomp
from raycomp.config import JobConfig, SourceMap, job_schema, parse_job, read_job, read_value, set_key, sweep_schema
from raycomp.distributed.interrupt import interruptible, told
from raycomp.errors import ConfigError, Problem, RaycompError, visible

_PIPE_WIDTH = 120
_INTERRUPTED = 130

_JOB = click.argument("job", type=click.Path(path_type=Path))
_SETTINGS = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a key of the job: training.epochs=3 (repeatable).",
)
_RESUME = click.option("--resume", is_flag=True, help="Go on with the latest unfinished run of this job.")


class _Commands(click.Group):
    """Tells raycomp's errors without a traceback, unless --debug asks for it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with interruptible():
                return super().invoke(ctx)
        except RaycompError as error:
            if ctx.params.get("debug"):
                raise
            tell(error, Console(stderr=True))
            ctx.exit(2 if isinstance(error, ConfigError) else 1)
        except KeyboardInterrupt as error:
            ctx.exit(getattr(error, "exit_code", _INTERRUPTED))  # raycomp's own knows its signal


def tell(error: RaycompError, console: Console) -> None:
    """Prints an error: where it is, its cause, and on a line of its own what would be right."""
    problems = error.problems if isinstance(error, ConfigError) else (_problem(error),)
    if len(problems) > 1:
        console.print(Text(f"{len(problems)} problems", style="bold"))
    for problem in problems:
        where = f"{problem.where}: " if problem.where else ""
        told = visible(f"{where}{problem.message}", lines=True)
        console.print(Text.assemble(("error ", "bold red"), told), soft_wrap=True)
        if problem.remedy:
            console.print(Text(f"      {visible(problem.remedy, lines=True)}"), soft_wrap=True)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(raycomp.__version__)
def main(debug: bool) -> None:
    """Compresses PyTorch models on Ray clusters: prune, quantize, distil; verified and stored."""


@main.command()
@_JOB
@_RESUME
@_SETTINGS
def run(job: Path, resume: bool, settings: tuple[str, ...]) -> None:
    """Run a job file.

    On the cluster of RAY_ADDRESS or the file's cluster.address, else on a local Ray of its own.
    """
    from raycomp.report import ProgressPrinter, print_result

    how = _resuming("run", job, settings)
    with ProgressPrinter() as progress, told(progress.message, lambda: "before a run began", how):
        config, source = _job(job, settings)
        progress.message(f"job {config.name}: starting raycomp {raycomp.__version__}")
        from raycomp.distributed.job import CompressionJob

        result = CompressionJob(config, job.resolve().parent, source).fit(
            resume=resume, progress=progress, resume_with=how
        )
    print_result(_console(), result.summary, result.artifact_uri, result.report_path)


@main.command()
@_JOB
@_SETTINGS
def validate(job: Path, settings: tuple[str, ...]) -> None:
    """Check a job file without a cluster.

    Its keys, its task, its model's module names and its storage.
    """
    config, source = _job(job, settings)
    click.echo(f"job {config.name}: checking it with raycomp {raycomp.__version__}", err=True)
    from raycomp.distributed.job import CompressionJob

    for warning in CompressionJob(config, job.resolve().parent, source).validate():
        click.echo(warning)
    compressors = [f"{stage.name}: {' + '.join(item.type for item in stage.compressors)}" for stage in config.stages]
    click.echo(f"{job} is right: {'; '.join(compressors)}")


@main.command()
@_JOB
@click.option("--address", required=True, help="The cluster's dashboard: http://host:8265.")
@click.option(
    "--working-dir",
    type=click.Path(path_type=Path),
    default=Path(),
    show_default="the current folder",
    help="The folder to copy to the cluster; it holds the job file and its task.",
)
@click.option("--follow/--no-follow", default=True, show_default=True, help="Show the log and end as the job ends.")
@click.option(
    "--ship-raycomp", is_flag=True, help="Copy this raycomp along, for a cluster that has none or another one."
)
@_RESUME
@_SETTINGS
def submit(
    job: Path,
    address: str,
    working_dir: Path,
    follow: bool,
    ship_raycomp: bool,
    resume: bool,
    settings: tuple[str, ...],
) -> None:
    """Run a job file on a cluster through Ray Jobs.

    The keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go along where the storage is s3://, unless
    cluster.send_credentials is false; who can read the cluster's dashboard or logs can read them there.
    """
    from raycomp import submit as jobs
    from raycomp.distributed.cluster import exposure

    config, _ = _job(job, settings)
    plan = jobs.plan_submission(config, job, working_dir, settings=settings, resume=resume, ship_raycomp=ship_raycomp)
    if plan.secrets:
        click.echo(exposure(plan.secrets), err=True)
    with jobs.jobs_client(address) as client:
        submission = jobs.send(client, plan)
        click.echo(f"submitted {submission} to {address}", err=True)
        if not follow:
            click.echo(submission)
            return
        try:
            ended = jobs.follow(client, submission, _write)
        except KeyboardInterrupt as error:
            hint = f"ray job logs --follow --address {address} {submission}"
            click.echo(f"\nthe job goes on; to see its log: {hint}; to end it: ray job stop instead of logs", err=True)
            sys.exit(getattr(error, "exit_code", _INTERRUPTED))
    if ended.reason:
        click.echo(f"error {submission}: {ended.reason}", err=True)
    sys.exit(ended.exit_code)


@main.command()
@click.argument("uri")
def show(uri: str) -> None:
    """Show what a stored run holds, or which runs a job's folder holds."""
    from raycomp.report import files_table, result_table
    from raycomp.report.comparison import load_line, rounding_texts, verification_texts
    from raycomp.report.outcome import doubts
    from raycomp.report.table import Visible, print_line
    from raycomp.results.summary import RunSummary
    from raycomp.storage import MANIFEST, open_artifact, open_store
    from raycomp.storage.artifact import understood

    if not open_store(uri).exists(MANIFEST) and _list(uri):
        return
    with understood(uri):
        artifact = open_artifact(uri)
        manifest, console = artifact.manifest, _console()
        if manifest.figures:
            names = {"job": manifest.job, "run": manifest.run, "created": manifest.created}
            found = RunSummary.from_figures(manifest.figures, **names)
            console.print(Visible(result_table(found)))
            warnings = [f"warning: {warning}" for warning in (*doubts(found), *found.warnings)]
            lines = [*(sentence for sentence, _ in verification_texts(found)), *rounding_texts(found), *warnings]
        else:
            lines = [f"{manifest.job}  {manifest.run}"]
        alone = bool(manifest.figures.get("runs_alone", True))
        lines += [f"created {manifest.created}", f"load    {load_line(artifact.uri, alone)}"]
        for line in lines:
            print_line(console, line)
        sizes = {name: (file.bytes, file.sha256) for name, file in manifest.files.items()}
        console.print(Visible(files_table(sizes)))


@main.command("list")
@click.argument("uri")
def list_runs(uri: str) -> None:
    """List the stored runs of a storage or of one job's folder, each with what `show` and `export` take."""
    from raycomp.storage import MANIFEST, open_store

    if not _list(uri):
        click.echo(f"there is no stored run below {uri}", err=True)
        sys.exit(1)
    if open_store(uri).exists(MANIFEST):
        click.echo(f"this is a stored run itself; what it holds: {shlex.join(['raycomp', 'show', uri])}", err=True)


def _list(uri: str) -> bool:
    """Prints the runs below a place; whether there are any."""
    from raycomp.report.table import print_line
    from raycomp.storage import artifact_uris, open_artifact

    uris = artifact_uris(uri)
    for each in uris:
        try:
            told = open_artifact(each).manifest.created
        except RaycompError as error:
            told = f"damaged: {error.message}"
        print_line(_console(), f"{shlex.quote(each)}  {told}")
    return bool(uris)


@main.command()
@click.argument("uri")
@click.option(
    "--to", "form", type=click.Choice(["onnx", "pt2", "state-dict", "report"]), required=True, help="What of it."
)
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def export(uri: str, form: str, directory: Path) -> None:
    """Copy a stored model into DIRECTORY, verified by its hashes."""
    from raycomp.pipeline.ending.load import export as export_files

    for path in export_files(uri, form, directory):
        click.echo(path)


@main.command()
@click.argument("sweep", type=click.Path(path_type=Path))
@click.option("--resume", is_flag=True, help="Go on with the latest equal sweep that has unfinished or failed trials.")
def sweep(sweep: Path, resume: bool) -> None:
    """Run a sweep file: a job over a search space.

    It ends in a table with the Pareto front of metric against MACs. A trial that fails has its cause there; the exit
    code is 1 only where all of them fail.
    """
    from raycomp.report import ProgressPrinter
    from raycomp.report.table import Visible, print_line

    how = _resuming("sweep", sweep)
    with ProgressPrinter() as progress, told(progress.message, lambda: "before a sweep began", how):
        progress.message(f"sweep {sweep}: starting raycomp {raycomp.__version__}")
        from raycomp.tune import sweep as run_sweep

        result = run_sweep(sweep, resume=resume, progress=progress, resume_with=how)
    console = _console()
    console.print(Visible(result.table()), soft_wrap=True)
    for line in (f"sweep     {result.uri}", f"report    {result.report_path}"):
        print_line(console, line)
    if len(result.failed) == len(result.rows):
        sys.exit(1)


@main.command()
@click.option("--sweep", is_flag=True, help="That of sweep files.")
def schema(sweep: bool) -> None:
    """Print the JSON schema of job files, for editors."""
    click.echo(json.dumps(sweep_schema() if sweep else job_schema(), indent=2))


def _job(path: Path, settings: Sequence[str]) -> tuple[JobConfig, SourceMap]:
    """The job that a file and overrides describe, and where its keys are.

    Raises:
        ConfigError: every problem with its line, those of its config lists among them.
    """
    raw, source = read_job(path)
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise ConfigError([Problem(f"--set {setting}", "it has no '='", "should be such as training.epochs=3")])
        raw = set_key(raw, key, read_value(value, f"--set {setting}"))
    try:
        return parse_job(raw, where=""), source
    except ConfigError as error:
        from raycomp.pipeline.preflight import selection_problems

        found = selection_problems(raw, path.resolve().parent)
        raise source.located(ConfigError([*error.problems, *found])) from None


def _resuming(command: str, file: Path, settings: Sequence[str] = ()) -> str:
    """The command line that goes on with what was interrupted."""
    options = [part for setting in settings for part in ("--set", setting)]
    return shlex.join(["raycomp", command, str(file), "--resume", *options])


def _console() -> Console:
    """Standard output; in a pipe or log wide enough that tables keep their lines."""
    console = Console()
    if not console.is_terminal:
        console.width = max(_PIPE_WIDTH, shutil.get_terminal_size().columns)
    return console


def _problem(error: RaycompError) -> Problem:
    return Problem(error.where or "", error.message, error.remedy or "")


def _write(text: str) -> None:
    click.echo(text, nl=False)
