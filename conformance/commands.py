"""The command line of the kit."""

import asyncio
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from conformance.client_runner.adapters import BuildError, read_adapters
from conformance.client_runner.cases import load_client_cases
from conformance.client_runner.run import Adapter, run_client_cases, running_adapter
from conformance.server_runner import report
from conformance.server_runner.run import CaseResult, run_cases
from conformance.server_runner.suite import PROFILES, SuiteError, load_cases, select
from conformance.server_runner.target import Keys, Target

Result = TypeVar("Result")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Prove that a client or a server follows the contract of llama2-grpc."""


def _run_coroutine(awaitable: Coroutine[Any, Any, Result]) -> Result:
    """Run a command; SIGTERM ends it as Ctrl-C does, so that the servers of the kit are stopped."""

    async def run() -> Result:
        task = asyncio.ensure_future(awaitable)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)


def report_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the reports to a command."""
    command = click.option("--junit", type=click.Path(path_type=Path), help="File for the results as JUnit's XML.")(
        command
    )
    return click.option("--json-report", type=click.Path(path_type=Path), help="File for the results as JSON.")(command)


@main.command()
@click.option(
    "--address", metavar="HOST:PORT", help="Address of the server; without it, this repository's server starts."
)
@click.option("--key", help="API key of the calls that need no other account.")
@click.option("--keys", type=click.Path(path_type=Path), help="JSON file of API keys by role (conformance/README.md).")
@click.option("--json", "json_url", metavar="URL", help="URL of the JSON gateway, for the profile json.")
@click.option("--profiles", default=",".join(PROFILES), show_default=True, help="Profiles that the server claims.")
@click.option("--known-failures", type=click.Path(path_type=Path), help="File with one CASE: REASON per line.")
@click.option("--case", "patterns", multiple=True, help="Only the cases whose names start with this text; repeatable.")
@report_options
def server(address: str | None, patterns: tuple[str, ...], **options: Any) -> None:
    """Run the cases against a server and print a table."""
    try:
        claimed = _profiles(options["profiles"])
        known_failures = _read_known_failures(options["known_failures"])
        cases = select(load_cases(), patterns)

        async def run(address: str, keys: Keys, json_url: str | None) -> list[CaseResult]:
            target = Target.connect(address, keys, json_url)
            try:
                return await run_cases(
                    target, cases, claimed=claimed, known_failures=known_failures, on_result=_print_failure
                )
            finally:
                await target.close()

        if address is None:
            results = _run_coroutine(_run_own(run))
        else:
            results = _run_coroutine(run(address, Keys.read(options["keys"], options["key"]), options["json_url"]))
    except SuiteError as error:
        raise click.ClickException(str(error)) from error
    _finish(results, options["json_report"], options["junit"])


async def _run_own(run: Callable[[str, Keys, str | None], Any]) -> list[CaseResult]:
    """Run against this repository's server behind its Envoy example."""
    # Its start needs torch; a run against another server does not.
    from conformance.service.launch import running_envoy, running_service

    with tempfile.TemporaryDirectory() as folder:
        async with running_service(Path(folder)) as service, running_envoy(Path(folder), service.address) as url:
            results: list[CaseResult] = await run(service.address, Keys.read(service.keys_file, None), url)
            return results


@main.command()
@click.argument("command", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Build and test every adapter whose toolchain is installed.")
@click.option("--known-failures", type=click.Path(path_type=Path), help="File with one CASE: REASON per line.")
@report_options
def client(command: tuple[str, ...], everything: bool, **options: Any) -> None:
    """Run the cases against a client: COMMAND is an adapter, after `--`."""
    if everything == bool(command):
        raise click.UsageError("COMMAND: give either the command of an adapter or --all")
    known_failures = _read_known_failures(options["known_failures"])
    results: list[CaseResult] = []
    try:
        adapters = _built_adapters() if everything else [(command[0], list(command), known_failures)]
        for name, parts, expected in adapters:
            print(f"{name}:", file=sys.stderr, flush=True)
            found = _run_adapter(parts, {**expected, **known_failures})
            results += [replace(one, case=replace(one.case, name=f"{name}/{one.case.name}")) for one in found]
    except BuildError as error:
        raise click.ClickException(str(error)) from error
    _finish(results, options["json_report"], options["junit"])


def _run_adapter(command: list[str], known_failures: Mapping[str, str]) -> list[CaseResult]:
    def open_client(address: str) -> AbstractAsyncContextManager[Adapter]:
        return running_adapter(command, address)

    return _run_coroutine(run_client_cases(open_client, load_client_cases(), known_failures))


def _built_adapters() -> Iterator[tuple[str, list[str], Mapping[str, str]]]:
    for entry in read_adapters():
        if entry.missing:
            print(f"{entry.name}: not run, because {', '.join(entry.missing)} is not installed", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            yield entry.name, entry.build(Path(folder)), entry.known_failures


@main.command()
@click.option("--full", is_flag=True, help="Run every case against every mutant; takes most of an hour.")
def mutants(full: bool) -> None:
    """Check that the cases find every wrong server and every wrong client of the kit."""
    # Their start needs torch; the other commands do not.
    from conformance.mutants.matrix import run_matrix

    problems = _run_coroutine(run_matrix(full, lambda line: print(line, flush=True)))
    print("\n".join(problems) or "every mutant is found by the cases that are named for it")
    sys.exit(1 if problems else 0)


@main.command()
@click.option("--bodies", default=20_000, show_default=True, help="Number of JSON bodies.")
@click.option("--seed", default=1, show_default=True, help="Selects the bodies.")
@click.option(
    "--json-share", default=20, show_default=True, help="One of this number of bodies also goes through Envoy."
)
def equivalence(bodies: int, seed: int, json_share: int) -> None:
    """Compare the card's JSON Schema with this repository's server on generated bodies."""
    from conformance.equivalence.command import compare  # its server needs torch

    problems = _run_coroutine(compare(bodies, seed, json_share, lambda line: print(line, flush=True)))
    print("\n".join(problems) or "the differences are the exceptions of text_generation.proto")
    sys.exit(1 if problems else 0)


@main.command()
@click.argument("name", type=click.Choice(["transformers", "llama.cpp"]))
@report_options
def peers(name: str, **options: Any) -> None:
    """Run the text cases against another program that serves the made checkpoint."""
    from conformance.peers.run import run_peer  # the checkpoint needs numpy and SentencePiece

    try:
        results = _run_coroutine(run_peer(name))
    except ImportError as error:
        raise click.ClickException(f"{name}: {error}; install its packages (conformance/README.md)") from error
    for result in results:
        for difference in result.differences:
            print(f"{result.case.name}: {difference}", file=sys.stderr)
    _finish(results, options["json_report"], options["junit"])


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def checkpoint(folder: Path) -> None:
    """Write the made checkpoint, its card and its keys into FOLDER, for another server."""
    from conformance.service.checkpoint import make_checkpoint  # needs numpy and SentencePiece
    from conformance.service.keys import write_keys, write_receipt_key
    from conformance.service.launch import CARD

    make_checkpoint(folder / "checkpoint")
    (folder / "card.yaml").write_text(CARD.read_text())
    write_keys(folder / "keys.yaml", folder / "keys.json")
    write_receipt_key(folder / "receipts.key")


def _profiles(text: str) -> frozenset[str]:
    claimed = frozenset(filter(None, text.split(",")))
    if unknown := claimed - set(PROFILES):
        raise SuiteError(f"--profiles: {min(unknown)} is not a profile; use {', '.join(PROFILES)}")
    return claimed


def _read_known_failures(path: Path | None) -> dict[str, str]:
    lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition(":") for line in lines if line.strip() and not line.startswith("#")]
    return {name.strip(): reason.strip() for name, _, reason in pairs}


def _print_failure(result: CaseResult) -> None:
    if not result.ok:
        print(f"{result.outcome}: {result.case.name}", file=sys.stderr, flush=True)


def _finish(results: list[CaseResult], json_report: Path | None, junit: Path | None) -> None:
    print(report.table(results))
    if json_report is not None:
        report.write_json(results, json_report)
    if junit is not None:
        report.write_junit(results, junit)
    sys.exit(0 if all(result.ok for result in results) else 1)
