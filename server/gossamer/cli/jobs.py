"""`gossamer jobs`: training jobs of a server, over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer

from gossamer.cli.options import DEFAULT_URL, AsJson, Assignments, Key, Url
from gossamer.cli.output import Output, table, when

if TYPE_CHECKING:
    from gossamer.cli.remote import Server

app = typer.Typer(
    help="Training jobs of a running server; a worker carries them out.", no_args_is_help=True
)

_FILE_ID = re.compile(r"file-[0-9a-f]{24}")
#: Jobs of one request.
_PAGE = 100

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as `jobs ls` shows it.")]


@app.command()
def create(
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Examples, one JSON object a line; uploaded first. Or the id of a file that the "
            "server has.",
        ),
    ],
    method: Annotated[
        str, typer.Option(metavar="NAME", help="One of those that `gossamer methods` lists.")
    ] = "sparta",
    setting: Assignments = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Of the adapter to make.  [default: the server's choice]"
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Examples to measure on; a file or an id, as --data."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", help="Of everything random.  [default: drawn]", min=0),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the job to its end, as `jobs logs -f`.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Have the server train an adapter.

    With --wait the exit code is 1 when the job does not succeed. Ctrl-C leaves the job running.
    """
    from gossamer.cli.assignments import read_assignments
    from gossamer.cli.following import conclude, follow
    from gossamer.cli.remote import Server
    from gossamer.jobs.methods import find_declaration

    output = Output(as_json)
    declaration = find_declaration(method, for_job=True)
    parameters, settings = read_assignments(declaration, setting or [])
    body: dict[str, Any] = {"model": "base", "adapter": {"method": method, **parameters}}
    if settings:
        body["hyperparameters"] = settings
    if name is not None:
        body["suffix"] = name
    if seed is not None:
        body["seed"] = seed
    files = {"training_file": _file(data, "--data")}
    if eval_data is not None:
        files["validation_file"] = _file(eval_data, "--eval-data")
    with Server(url, key) as server:
        with _on_server(server, files, output) as ids:
            job = server.call("POST", "/v1/fine_tuning/jobs", json=body | ids)
        hint = "" if wait else f"; `gossamer jobs logs -f {job['id']}` follows it"
        output.result(job, f"{job['id']} is {job['status']}{hint}.")
        if wait:
            conclude(follow(server, job["id"], output), output)


@app.command("ls")
def list_(
    limit: Annotated[
        int, typer.Option(metavar="COUNT", min=1, max=10_000, help="The most jobs to list.")
    ] = 20,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """List the tenant's jobs, the newest first."""
    from gossamer.cli.remote import Server

    output = Output(as_json)
    with Server(url, key) as server:
        jobs, has_more = _newest(server, limit)
    head = ("ID", "STATUS", "METHOD", "ADAPTER", "STEP", "CREATED")
    rows = [
        (
            job["id"],
            _status(job),
            job["adapter"]["method"],
            job["adapter_name"],
            _step(job),
            when(job["created_at"]),
        )
        for job in jobs
    ]
    output.result(
        {"data": jobs, "has_more": has_more}, table(head, rows, ("STEP",)) if rows else ""
    )
    if has_more:
        output.note("There are more; --limit lists them.")


@app.command()
def show(job_id: JobId, url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """Show a job, and its checkpoints that can be tried."""
    from gossamer.cli.following import job_path
    from gossamer.cli.remote import Server

    with Server(url, key) as server:
        job = server.call("GET", job_path(job_id))
        checkpoints = _all_checkpoints(server, job_id)
    text = "\n".join(f"{name:<16}{value}" for name, value in _facts(job))
    if checkpoints:
        rows = [
            (c["fine_tuned_model_checkpoint"], _figures(c["metrics"]), when(c["created_at"]))
            for c in checkpoints
        ]
        text += "\n\n" + table(("CHECKPOINT", "METRICS", "CREATED"), rows)
    Output(as_json).result({**job, "checkpoints": checkpoints}, text)


@app.command()
def logs(
    job_id: JobId,
    follow_it: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the job is finished.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Show what a job tells, the oldest first.

    With -f the exit code is 1 when the job does not succeed. Ctrl-C leaves the job running.
    """
    from gossamer.cli.following import conclude, follow, show_log
    from gossamer.cli.remote import Server

    output = Output(as_json)
    with Server(url, key) as server:
        if follow_it:
            conclude(follow(server, job_id, output), output)
        else:
            show_log(server, job_id, output)


@app.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """End a job. It cannot be taken back."""
    _steer("cancel", job_id, url, key, as_json)


@app.command()
def pause(job_id: JobId, url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """Put a job aside after its next step, with a checkpoint to go on from."""
    _steer("pause", job_id, url, key, as_json)


@app.command()
def resume(job_id: JobId, url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """Put a paused job back into the queue."""
    _steer("resume", job_id, url, key, as_json)


def _steer(
    action: Literal["cancel", "pause", "resume"], job_id: str, url: str, key: str, as_json: bool
) -> None:
    from gossamer.cli.following import job_path
    from gossamer.cli.remote import Server

    with Server(url, key) as server:
        job = server.call("POST", job_path(job_id, f"/{action}"))
    Output(as_json).result(job, f"{job['id']} is {_status(job)}.")


def _file(given: str, option: str) -> str | Path:
    """A path to upload, or the id of a file that is there."""
    path = Path(given)
    if path.is_file():
        return path
    if _FILE_ID.fullmatch(given):
        return given
    raise typer.BadParameter(f"there is no file {given!r}", param_hint=option)


@contextmanager
def _on_server(
    server: Server, files: Mapping[str, str | Path], output: Output
) -> Iterator[dict[str, str]]:
    """Field → id, what is here uploaded. If the block fails, that is deleted again: nobody would
    know of it, and it counts in the tenant's quota."""
    ids: dict[str, str] = {}
    made: list[str] = []
    try:
        for field, file in files.items():
            if isinstance(file, Path):
                made.append(upload_file(server, file, output)["id"])
                ids[field] = made[-1]
            else:
                ids[field] = file
        yield ids
    except BaseException:
        for file_id in made:
            _delete_file(server, file_id, output)
        raise


def upload_file(server: Server, file: Path, output: Output) -> dict[str, Any]:
    """Upload a file to train on, with a bar; the file as the server describes it."""
    from gossamer.cli.bars import transfer

    total = file.stat().st_size
    with file.open("rb") as opened, transfer(output, f"sending {file.name}", total) as advance:
        part = (file.name, _Watched(opened, advance), "application/jsonl")
        return server.call("POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": part})


class _Watched:
    """A file whose reading is told to somebody; httpx takes its length by `fileno`."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file = file
        self._advance = advance

    def fileno(self) -> int:
        return self._file.fileno()

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self._advance(len(piece))
        return piece


def _delete_file(server: Server, file_id: str, output: Output) -> None:
    from gossamer.cli.errors import CommandError

    try:
        server.call("DELETE", f"/v1/files/{file_id}")
    except CommandError as error:
        output.note(f"Warning: {file_id} stays on the server: {error.why}")


def _newest(server: Server, limit: int) -> tuple[list[dict[str, Any]], bool]:
    jobs: list[dict[str, Any]] = []
    while True:
        query = {"limit": min(_PAGE, limit - len(jobs))}
        after = {"after": jobs[-1]["id"]} if jobs else {}
        page = server.call("GET", "/v1/fine_tuning/jobs", params=query | after)
        jobs += page["data"]
        if not page["has_more"] or not page["data"] or len(jobs) >= limit:
            return jobs, page["has_more"]


def _all_checkpoints(server: Server, job_id: str) -> list[dict[str, Any]]:
    from gossamer.cli.following import job_path

    return list(server.pages(job_path(job_id, "/checkpoints"), limit=_PAGE))


def _status(job: Mapping[str, Any]) -> str:
    wanted = job.get("wanted")
    return str(job["status"]) + (f", asked to {wanted}" if wanted else "")


def _step(job: Mapping[str, Any]) -> str:
    progress = job["progress"]
    return "-" if progress is None else f"{progress['step']}/{progress['steps']}"


def _facts(job: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is known of a job, for people."""
    yield "id", job["id"]
    yield "status", _status(job)
    error = job["error"]
    if error is not None:
        yield "error", error["message"]
    yield "adapter", job["version"] or job["adapter_name"]
    if job["digest"] is not None:
        yield "digest", job["digest"]
    method = dict(job["adapter"])
    yield "method", method.pop("method")
    yield "parameters", _assignments(method)
    yield "settings", _assignments(job["hyperparameters"])
    if job["references"]:
        yield "begins with", ", ".join(job["references"].values())
    yield "seed", str(job["seed"])
    yield "files", " ".join(filter(None, (job["training_file"], job["validation_file"])))
    if job["result_files"]:
        yield "results", " ".join(job["result_files"])
    progress = job["progress"]
    if progress is not None:
        loss = "" if progress["loss"] is None else f", loss {progress['loss']:.4f}"
        yield "step", _step(job) + loss
    for name in ("created_at", "started_at", "estimated_finish", "finished_at"):
        if job[name] is not None:
            yield name.removesuffix("_at").replace("_", " "), when(job[name])


def _assignments(values: Mapping[str, Any]) -> str:
    """What was chosen, as `--set` takes it; what was left to the server is left out."""
    return " ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in values.items()
        if value is not None
    )


def _figures(metrics: Mapping[str, Any]) -> str:
    shown = {n: v for n, v in metrics.items() if v is not None and n != "step"}
    return "  ".join(f"{n} {v:.4g}" for n, v in shown.items()) or "-"
