"""The description at /openapi.json, and that no request made from it gets a 500."""

from __future__ import annotations

from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Ok

from tests.api.running import Running

load_all_checks()
#: What holds for every answer to every request, valid or not.
HOLDING: Any = [
    CHECKS.get_one(name)
    for name in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    )
]


def test_every_operation_documents_its_errors_and_its_key(api: Running) -> None:
    with api.http() as http:
        schema = http.get("/openapi.json").json()
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            if path.startswith("/health"):
                assert "security" not in operation
                continue
            assert operation["security"] == [{"key": []}]
            assert {"400", "401", "503"} <= set(operation["responses"]), path
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    reference = answer["content"]["application/json"]["schema"]["$ref"]
                    assert reference.endswith("/ErrorReply")


def fuzz(api: Running, examples: int) -> int:
    """Send requests made from the description, valid and invalid; how many operations."""
    with api.http() as http:
        raw = http.get("/openapi.json").json()
    headers = {"authorization": f"Bearer {api.new_key('fuzzer')}"}
    schema = schemathesis.openapi.from_dict(raw)
    schema.config.update(base_url=api.url)
    operations = list(schema.get_all_operations())

    def send(case: Any) -> None:
        if isinstance(case.body, dict) and "max_tokens" in case.body:
            case.body["max_tokens"] = 1  # the text is not the point
        response = case.call(session=session, headers=headers, timeout=30)
        case.validate_response(response, checks=HOLDING)

    bounded = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with requests.Session() as session:
        for operation in operations:
            assert isinstance(operation, Ok), operation
            bounded(given(case=operation.ok().as_strategy())(send))()
    return len(operations)


def test_no_request_gets_a_500(api: Running) -> None:
    assert fuzz(api, examples=12) >= 31


@pytest.mark.gate
@pytest.mark.timeout(1200)
def test_no_request_of_many_gets_a_500(api: Running) -> None:
    fuzz(api, examples=400)
