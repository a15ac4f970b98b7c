"""Readers for Envoy's HTTP responses."""

import json
from typing import Any

import httpx2


def events(text: str) -> list[dict[str, Any]]:
    """Parse an event stream and check its format."""
    assert text.endswith("\n\n")
    blocks = text.strip().split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def details(response: httpx2.Response) -> dict[str, Any]:
    """Return the details of an error by type; every error is a google.rpc.Status in JSON."""
    assert response.headers["content-type"] == "application/json"
    status = response.json()
    assert status.keys() == {"code", "message", "details"}
    assert status["message"]
    return {detail["@type"].removeprefix("type.googleapis.com/google.rpc."): detail for detail in status["details"]}


def violations(response: httpx2.Response) -> dict[str, str]:
    """Return the field and description of each violation of a BadRequest."""
    assert response.status_code == 400
    assert response.json()["code"] == 3
    return {entry["field"]: entry["description"] for entry in details(response)["BadRequest"]["field_violations"]}
