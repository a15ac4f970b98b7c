"""Converts a seccomp profile in the format of Docker and Podman to that of the OCI runtime specification."""

from collections.abc import Iterable
from typing import Any

ARCHITECTURE = "amd64"
LINUX_ARCHITECTURES = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]


def runtime_profile(profile: dict[str, Any], capabilities: Iterable[str] = ()) -> dict[str, Any]:
    """Return the part of a profile that applies to x86-64, for a container with these capabilities.

    An entry with `includes` applies only if its architecture and capabilities are those of the container; one with
    `excludes` only if they are not. An entry for a minimum kernel version applies, because current kernels have it.
    """
    granted = set(capabilities)
    rules = [rule for rule in profile["syscalls"] if _applies(rule, granted)]
    result = {
        "defaultAction": profile["defaultAction"],
        "architectures": LINUX_ARCHITECTURES,
        "syscalls": [_rule(rule) for rule in rules],
    }
    if "defaultErrnoRet" in profile:
        result["defaultErrnoRet"] = profile["defaultErrnoRet"]
    return result


def _applies(rule: dict[str, Any], granted: set[str]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    architectures = includes.get("arches") or [ARCHITECTURE]
    included = ARCHITECTURE in architectures and set(includes.get("caps") or []) <= granted
    excluded = ARCHITECTURE in (excludes.get("arches") or []) or bool(set(excludes.get("caps") or []) & granted)
    return included and not excluded


def _rule(rule: dict[str, Any]) -> dict[str, Any]:
    kept = {"names": rule.get("names") or [rule["name"]], "action": rule["action"]}
    if rule.get("args"):
        kept["args"] = rule["args"]
    if "errnoRet" in rule:
        kept["errnoRet"] = rule["errnoRet"]
    return kept
