"""The tests of each module: the tests of its package, the fast ones first."""

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
