"""The tests of each module: its closest tests, then the tests of its package, the fast ones first."""

from pathlib import Path

SERVER = Path("server/llama2_server")
MUTATED = ("admission", "generation", "usage", "engine")
NOT_MUTATED = (SERVER / "engine/cuda", SERVER / "usage/migrations")
TESTS = {
    "admission": "unit/admission reliability/test_retry_times.py integration/service/test_admission.py "
    "integration/service/test_fairness.py integration/service/test_statuses.py integration/test_quota_refunds.py "
    "integration/test_quota.py unit/cli/test_keys.py reliability/test_queue_fairness.py",
    "generation": "unit/generation integration/service reliability/test_sequence_end.py "
    "integration/test_response_cache.py",
    "usage": "unit/cli/test_usage.py integration/usage reliability/test_store_faults.py",
    "engine": "unit/engine/test_engine.py unit/engine/test_step_runner.py unit/engine/test_prefix_cache.py "
    "unit/engine/test_sampling.py unit/engine/test_arrivals.py unit/engine/test_memory.py unit/engine/fingerprint "
    "unit/engine/test_sampled_texts.py unit/generation/test_supervised_engine.py unit/lifecycle "
    "reliability/test_sequence_end.py",
    "engine/text": "unit/engine/text integration/service/test_generation.py",
    "engine/checkpoint": "unit/engine/checkpoint integration/checkpoints integration/engine",
    "engine/model": "unit/engine/model unit/engine/native integration/engine",
    "engine/native": "unit/engine/native integration/engine",
}

_QUEUE = "unit/admission/test_request_queue.py reliability/test_queue_fairness.py reliability/test_retry_times.py"
CLOSEST = {
    "admission/fair_queue": _QUEUE,
    "admission/request_queue": _QUEUE,
    "admission/reservation": _QUEUE,
    "admission/wait_estimate": _QUEUE,
    "admission/retry_times": "reliability/test_retry_times.py",
    "admission/quota": "unit/admission/test_quota.py integration/test_quota_refunds.py integration/test_quota.py",
    "admission/call_budget": "unit/admission/test_call_budget.py integration/service/test_call_budget.py",
    "admission/keys": "unit/cli/test_keys.py unit/cli/test_account_limits.py unit/admission/test_accounts.py",
    "admission/accounts": "unit/admission/test_accounts.py",
    "generation/accounting": "integration/service/test_accounting.py",
    "generation/coalescing": "unit/generation/test_coalescing.py unit/generation/test_coalescing_failures.py",
    "generation/reply_source": "integration/service/test_sharing.py integration/service/test_admission.py",
    "generation/response_cache": "integration/test_response_cache.py",
    "generation/supervised_engine": "unit/generation/test_supervised_engine.py reliability/test_sequence_end.py",
    "generation/text_stream": "unit/generation/test_text_stream.py",
    "usage/budgets": "integration/usage/test_budgets.py integration/test_budgets.py",
    "usage/forwarder": "integration/usage/test_forwarding.py integration/usage/test_budgets.py",
    "usage/keys": "integration/usage/test_shared_keys.py integration/idempotency",
    "usage/ledger": "integration/usage/test_ledger.py integration/usage/test_reading.py",
    "usage/local": "integration/usage/test_ledger.py integration/usage/test_durability.py "
    "integration/usage/test_database_file.py",
    "usage/operations": "unit/cli/test_usage.py",
    "usage/store": "integration/usage/test_store.py",
    "engine/sampling": "unit/engine/test_sampling.py",
    "engine/prefix_cache": "unit/engine/test_prefix_cache.py",
    "engine/step_runner": "unit/engine/test_step_runner.py",
    "engine/memory": "unit/engine/test_memory.py",
    "engine/fingerprint": "unit/engine/fingerprint unit/lifecycle/test_fingerprint.py",
    "engine/text/detokenizer": "unit/engine/text/test_detokenizer.py",
    "engine/text/stop_sequences": "unit/engine/text/test_stop_sequences.py",
    "engine/text/tokenizer": "unit/engine/text/test_tokenizer.py unit/engine/text/test_tokenizer_json.py",
    "engine/checkpoint/chat_template": "unit/engine/checkpoint/test_chat_template.py",
    "engine/checkpoint/digests": "unit/engine/checkpoint/test_digests.py",
    "engine/checkpoint/hub": "unit/engine/checkpoint/test_hub.py integration/test_weights_fetch.py",
    "engine/checkpoint/tokenizer_files": "unit/engine/checkpoint/test_tokenizer_files.py",
    "engine/checkpoint": "unit/engine/checkpoint/test_files.py unit/engine/checkpoint/test_loader.py",
    "engine/model/llama": "unit/engine/model/test_llama.py",
    "engine/model/cpu_kernels": "unit/engine/model/test_cpu_kernels.py",
    "engine/model/weight_layout": "unit/engine/native/test_packing.py unit/engine/native/test_amx.py",
    "engine/model/packed_weights": "unit/engine/native/test_packing.py unit/engine/native/test_packed_model.py",
    "engine/model/native": "unit/engine/native/test_decoder.py unit/engine/native/test_native_sampling.py",
}
"""By the start of a module's path, the tests that run first. The first match counts."""


def closest_first(path: Path) -> list[str]:
    """Return the tests of a module, in the order in which they find most mutants soonest."""
    name = str(path.relative_to(SERVER))
    closest = next((tests for prefix, tests in CLOSEST.items() if name.startswith(prefix)), "")
    return list(dict.fromkeys(f"tests/{test}" for test in f"{closest} {TESTS[package_of(path)]}".split()))


def files_of(package: str) -> list[str]:
    """Return the files and folders of a package's tests."""
    return [f"tests/{name}" for name in TESTS[package].split()]


def modules(root: Path) -> list[Path]:
    """Return the mutated modules, relative to `root`."""
    found = [path.relative_to(root) for name in MUTATED for path in sorted((root / SERVER / name).rglob("*.py"))]
    return [path for path in found if not any(path.is_relative_to(folder) for folder in NOT_MUTATED)]


def package_of(path: Path) -> str:
    """Return the key of `TESTS` for a module: the deepest folder that has one."""
    folders = [str(folder.relative_to(SERVER)) for folder in path.parents if folder.is_relative_to(SERVER)]
    return next(folder for folder in folders if folder in TESTS)
