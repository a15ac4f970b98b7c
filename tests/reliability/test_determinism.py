"""Texts are equal where fingerprints are, over rows, restarts, reuse of the KV cache and kernels."""

from pathlib import Path

import pytest
from tests.reliability.determinism import comparison, texts
from tests.reliability.determinism.comparison import FINGERPRINTS, RUNS, amx_runs, compare

TEXTS = 2000


@pytest.mark.timeout(600)
def test_equal_fingerprints_have_equal_texts(tmp_path: Path) -> None:
    """2,000 texts of at least 32 tokens, greedy and sampled; whatever changes a text has another fingerprint."""
    report = compare(TEXTS, tmp_path)
    assert report.problems == []
    assert report.texts >= TEXTS
    assert report.fingerprints == FINGERPRINTS
    assert report.reused_tokens > TEXTS
    # Other weights, kernels and precisions do change texts, so the equal ones mean something. The number of torch's
    # threads may keep all bits of so small a model, and AMX may keep all tokens.
    equal = 2 if amx_runs() else 1
    assert report.differing_fingerprints >= FINGERPRINTS * (FINGERPRINTS - 1) // 2 - equal
    assert {run.rows for run in RUNS} == set(range(1, 9))
    parameters = [params for _, params in texts.requests(TEXTS // len(RUNS))]
    assert {params.temperature == 0 for params in parameters} == {True, False}


def test_a_fingerprint_without_the_kernels_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails if two runs share a fingerprint and not their kernels."""
    runs = [run for run in RUNS if run.name in ("native, 1 rows", "torch, 1 row")]
    monkeypatch.setattr(comparison, "RUNS", runs)
    compute = texts.compute

    def with_one_fingerprint(run: texts.Run, count: int, folder: Path) -> texts.Texts:
        result = compute(run, count, folder)
        return texts.Texts("equal", result.token_ids, result.reused_tokens)

    monkeypatch.setattr(comparison, "compute", with_one_fingerprint)
    report = compare(40, tmp_path)
    assert report.fingerprints == 1
    assert any("have one fingerprint and other texts" in problem for problem in report.problems)
