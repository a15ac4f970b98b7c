"""`make checkov` reports each failure that no exception explains, and each exception that nothing needs."""

from typing import Any

import pytest
import yaml
from tools.audit.checkov import EXCEPTIONS, Failure, failures, violations

# A report as checkov 3.3.30 prints it, without the fields that the tool does not read.
REPORT: dict[str, Any] = {
    "check_type": "kubernetes",
    "summary": {"passed": 3, "parsing_errors": 0},
    "results": {
        "failed_checks": [
            {
                "check_id": "CKV_K8S_8",
                "check_name": "Liveness Probe Should be Configured",
                "file_path": "/demo.yaml",
                "resource": resource,
            }
            for resource in ("Pod.text.llama2-test", "Pod.text.llama2-forward.app.kubernetes.io/name-llama2")
        ]
    },
}


def test_failures_need_an_exception_for_their_resource() -> None:
    """An exception covers the resources that its expression matches as a whole."""
    found = list(failures([REPORT]))
    assert [failure.resource for failure in found] == ["Pod/llama2-test", "Pod/llama2-forward"]
    exception = {"check": "CKV_K8S_8", "resources": "Pod/.*-test", "reason": "it ends"}
    (line,) = violations(found, [exception])
    assert line == "/demo.yaml: Pod/llama2-forward: CKV_K8S_8: Liveness Probe Should be Configured"


def test_unused_exceptions_are_reported() -> None:
    """An exception of another check, or without a matching resource, must be removed."""
    failure = Failure("CKV_K8S_8", "name", "/demo.yaml", "Pod/llama2-test")
    exceptions = [{"check": "CKV_K8S_8", "resources": ".*", "reason": ""}]
    assert violations([failure], exceptions) == []
    unused = {"check": "CKV_K8S_9", "resources": ".*", "reason": ""}
    assert violations([failure], [*exceptions, unused]) == [
        "checkov.yaml: CKV_K8S_9: no resource fails it; remove the entry"
    ]


def test_files_that_checkov_cannot_read_are_an_error() -> None:
    """A manifest that was not checked must not count as passed."""
    report = {"summary": {"parsing_errors": 1}, "results": {"parsing_errors": ["/a.yaml"], "failed_checks": []}}
    with pytest.raises(RuntimeError, match=r"could not read .*a\.yaml"):
        list(failures([report]))


def test_each_exception_has_a_reason() -> None:
    """The exceptions name a check, its resources and a reason, each check and expression once."""
    entries = yaml.safe_load(EXCEPTIONS.read_text(encoding="utf-8"))
    assert all(set(entry) == {"check", "resources", "reason"} and len(entry["reason"]) > 20 for entry in entries)
    assert len({(entry["check"], entry["resources"]) for entry in entries}) == len(entries)
