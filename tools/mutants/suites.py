"""The mutated modules, and the test files of each package."""

from pathlib import Path

SERVER = Path("server/llama2_server")
MUTATED = ("admission", "generation", "usage", "engine")
NOT_MUTATED = (SERVER / "engine/cuda", SERVER / "usage/migrations")
TESTS = {
    "admission": "unit/admission reliability/test_retry_times.py integration/service/test_admission.py "
    "integration/service/test_accounting.py integration/service/test_call_budget.py "
    "integration/service/test_fairness.py integration/service/test_statuses.py integration/test_quota_refunds.py "
    "integration/test_quota.py unit/cli/test_keys.py unit/cli/test_account_limits.py "
    "reliability/test_queue_fairness.py",
    "generation": "unit/generation integration/service reliability/test_sequence_end.py "
    "integration/test_response_cache.py integration/replicas integration/telemetry integration/idempotency "
    "unit/lifecycle",
    "usage": "unit/cli/test_usage.py integration/usage integration/test_budgets.py integration/idempotency "
    "reliability/test_store_faults.py",
    "engine": "unit/engine/test_*.py unit/engine/fingerprint unit/engine/speculation unit/lifecycle "
    "unit/generation/test_supervised_engine.py integration/engine/test_prompt_lookup.py "
    "reliability/test_sequence_end.py",
    "engine/text": "unit/engine/text integration/service/test_generation.py",
    "engine/checkpoint": "unit/engine/checkpoint integration/checkpoints integration/test_weights_fetch.py "
    "integration/engine/test_config_cache.py integration/engine/test_loading_memory.py "
    "unit/engine/native/test_packed_model.py",
    "engine/model": "unit/engine/model unit/engine/native integration/engine/test_prompt_lookup.py "
    "integration/engine/test_loading_memory.py",
    "engine/native": "unit/engine/native integration/engine/test_native*.py",
}


def files_of(root: Path, package: str) -> list[str]:
    """Return the test files of a package, relative to `root`."""
    paths = [path for pattern in TESTS[package].split() for path in (root / "tests").glob(pattern)]
    files = {file for path in paths for file in (path.rglob("test_*.py") if path.is_dir() else [path])}
    return sorted(str(file.relative_to(root)) for file in files)


def modules(root: Path) -> list[Path]:
    """Return the mutated modules, relative to `root`."""
    found = [path.relative_to(root) for name in MUTATED for path in sorted((root / SERVER / name).rglob("*.py"))]
    return [path for path in found if not any(path.is_relative_to(folder) for folder in NOT_MUTATED)]


def package_of(path: Path) -> str:
    """Return the key of `TESTS` for a module: the deepest folder that has one."""
    folders = [str(folder.relative_to(SERVER)) for folder in path.parents if folder.is_relative_to(SERVER)]
    return next(folder for folder in folders if folder in TESTS)
