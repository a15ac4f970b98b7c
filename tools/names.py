"""List retired names that are still in use; `make check` runs it over the whole repository.

    python -m tools.names               # PATH:LINE: old -> new; the path of a file counts as its line 0
    python -m tools.names server docs   # in these folders or files only

The exit status is 1 if a name is found.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# The changelog lists the renames; the other files are not written by hand.
SKIP = re.compile(r"^CHANGELOG\.md$|(^|/)(test_)?names\.py$|\.lock$|/results/|/demo/|\.svg$")
WORD, METRIC, FLAG = r"\bNAME\b", r"\bllama2_NAME(_total)?\b", r"--NAME\b|\bLLAMA2_NAME\b|\bsettings\.NAME\b"
CLASS, FUNCTION, SERVER, OTHERS = r"\b(class|struct) NAME\b", r"\bdef NAME\b", "^server/", "^(client|benchmarks)/"
MODULE = r"llama2_server[./](\w+[./])*NAME(\.py\b| import\b)"
# Files that must not have the names, the form of the names, and old=new, where old is a regex. Ordinary words are found
# only as definitions, in the folder of the old name. Not listed: words that are correct there with another meaning
# (`join`, `settle`), and `served_from_cache`, which is a column of the usage database.
RETIRED = (
    ("", WORD, r"""
LINE_FULL=QUEUE_FULL WAIT_TOO_LONG=QUEUE_WAIT_TOO_LONG (QUOTA_STORE|LEDGER|ENGINE)_DOWN=*_UNAVAILABLE
DRAINING=SHUTTING_DOWN INTERNAL_FAULT=INTERNAL (LEDGER_FULL|USAGE_JOURNAL_FULL)=USAGE_UNAVAILABLE LineFull=QueueFull
WaitTooLong=QueueWaitTooLong (LedgerFull|UsageJournalFull)=UsageUnavailable
(Engine|Ledger|QuotaStore|Store|Redis)Down=*Unavailable
(Engine|Internal|Server)Fault=*Error RedisLink=RedisClient StartError=ConfigurationError BadSettings=SettingsError
SourcedSettings=ResolvedSettings LiveReply=GeneratedReply StoredReply=CachedReply WatchedEngine=SupervisedEngine
KeyAccounts=ApiKeyAuthenticator OpenAccounts=AnonymousAuthenticator FreeSlots=PrefixCache SeenTokens=PenaltyState
RowParams=BatchSamplingParams StoredTensor=TensorEntry HostSteps=HostStepRunner CudaSteps=CudaStepRunner
Nanoneurons=NeuronAmount TokenCounts=TokenUsage BareEngine=EngineOnly NotRun=SkippedPeer _EndedEarly=StartupCancelled
step_began_at=step_started_at slot_at=admitted_at store_failures=store_errors longest_piece=max_piece_length
any_pieces=chunk_invariant proven_error=verify_logits ENGINE_LOST=EXIT_ENGINE_FAILED SECOND_SIGNAL=EXIT_INTERRUPTED
NEWEST_WEIGHT=EMA_ALPHA NOTHING_COMPUTED=ZERO_TOKENS LAST_STEP_SECONDS=ENGINE_STOP_TIMEOUT_SECONDS
LAST_WORDS_SECONDS=STATUS_FLUSH_SECONDS SAY_\w+=PROGRESS_INTERVAL_*
(QUIET|LONGEST_UNTIL_QUIET|SILENCE)_SECONDS=IDLE_*_SECONDS LOOK_SECONDS=POLL_INTERVAL_SECONDS
REST_SECONDS=BACKOFF_SECONDS FRESH_SECONDS=READ_FLUSH_TIMEOUT_SECONDS LOOP_PATIENCE_SECONDS=LOOP_TIMEOUT_SECONDS
(MOST|LONGEST|LARGEST)_[A-Z]+\w*=MAX_* LEAST_\w+=MIN_* LINE_ELEMENTS=CACHE_LINE_ELEMENTS PICKLES=PICKLE_PATTERNS"""),
    ("", METRIC, """
waiting_requests=requests_queued running_slots=requests_running slots=max_concurrent_requests serving=ready
request_seconds=request_duration_seconds engine_step_seconds=engine_step_duration_seconds
cache_(hits|misses|bytes)=response_cache_* quota_refusals=quota_rejections quota_store_failures=quota_store_errors
ledger_(lag_seconds|pending_records)=usage_* (ledger|usage)_journal_bytes=usage_database_bytes"""),
    ("", FLAG, """
line_limit=max_queue_size grace_seconds=shutdown_grace_seconds allow_open=allow_unauthenticated keys_file=api_keys_file
when_quota_store_down=quota_fallback cache_(ttl_seconds|max_bytes|max_entry_bytes)=response_cache_* ledger_url=usage_url
(usage_)?journal_max_bytes=usage_max_pending_records
connection_(idle|age|age_grace)_seconds=max_connection_* compile=gpu_kernels
keepalive_seconds=keepalive_time_seconds max_streams_per_connection=max_concurrent_streams
step_timeout_seconds=engine_step_timeout_seconds probe_interval_seconds=readiness_probe_interval_seconds"""),
    ("", MODULE, """
servicer=text_generation information=model_service listening=server slots=request_queue flights=coalescing replies=reply
watchdog=supervised_engine readings=metrics speed=warm_up loading=model_loading refusal=main settings_sources=sources
redis_link=redis_client metering=pricing engines=database failures=errors lines=encoding exposition=metrics_server
logs=logging calls=call steps=step_runner kept=disk_cache description=config_cache parameters=weights
prefixes=prefix_cache sequences=sequence staging=read_buffers stopping=stop_sequences building=build products=matmul
product_kernels=matmul_kernels tuning=autotune"""),
    (SERVER, CLASS, """
(Ground|Stores|Parts)=Service Loaded=LoadedModel Slots=RequestQueue Turn=SlotLease Flights=Coalescer Seat=Subscription
Admissions=UsageRecorder Admission=RecordedRequest Figures=ReplyStats Readings=Collector Moments=GenerationTimes
Accounts=Authenticator Draining=ShuttingDown Steps=StepRunner Finish=SequenceResult Listener=SequenceListener
Staging=ReadBuffers Products=Matmul Tile=TileConfig Team=ThreadPool Rows=PaddedMatrix Run=TokenRun"""),
    (SERVER, FUNCTION, """
refuse_when_closed=check_open refuse_hopeless=check_wait refuse_when_full=check_capacity heard=record_outcome
leave=cancel ended=wait record_after=write_when_done warn_of_slowness=warn_if_timeouts_too_short grounded=start
opened=open_telemetry scraped=metrics_server outline=format_exception call_over=call_completed of_the_dead=acquire_stale
recall=load surfaces=piece_texts steps_for=build_step_runner tuned_ways=autotune fetch_into=download_to
_judge=_set_result _announce=_notify _hand_over=_release _give_up=_abandon _learn=_update_mean_hold"""),
    (OTHERS, CLASS, "Identity=ClientCertificate Connection=ServerConnection Contender=EngineUnderTest"),
    (OTHERS, CLASS, "Ground=Environment Rounds=InterleavedRuns Figures=Measurement"),
    (OTHERS, FUNCTION, "say=send when_complete=on_complete mapped=translate_errors reply_of=from_proto"),
    (OTHERS, FUNCTION, "converse=run_repl _obey=_run_command _take_turn=_run_turn others_share=foreign_cpu_share"),
)  # fmt: skip


def uses_in(path: str, text: str) -> Iterator[str]:
    """Yield `PATH:LINE: old -> new` for each retired name in a file."""
    text = f"{path}\n{text}"
    for files, form, names in RETIRED if not SKIP.search(path) else ():
        for old, new in (pair.split("=") for pair in names.split() if re.search(files, path)):
            pattern = form.replace("--NAME", f"--{old.replace('_', '-')}").replace("_NAME", f"_{old}")
            pattern = pattern.replace(f"LLAMA2_{old}", f"LLAMA2_{old.upper()}").replace("NAME", f"(?:{old})")
            for match in re.finditer(pattern, text):
                yield f"{path}:{text.count(chr(10), 0, match.start())}: {match[0]} -> {new}"


def main() -> None:
    """Print each use of a retired name; exit with 1 if there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["."], help="Folders or files; the whole repository by default.")
    paths = subprocess.check_output(["git", "ls-files", "--", *parser.parse_args().paths], text=True).splitlines()
    files = ((path, Path(path).read_text(encoding="utf-8", errors="ignore")) for path in paths if Path(path).is_file())
    uses = [use for path, text in files for use in uses_in(path, text)]
    print("\n".join(uses) or "no retired name is in use")
    sys.exit(bool(uses))


if __name__ == "__main__":
    main()
