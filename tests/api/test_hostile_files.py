"""The hostile adapter files of the format's own tests, through the upload route."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.api.running import Running
from tests.store_format.attacks import attacks

#: a file that none of the attacks may touch, where a path traversal would look for it
CANARY = Path(tempfile.gettempdir()) / "gossamer-canary"


def test_every_attack_gets_its_4xx_and_nothing_else(api: Running) -> None:
    key = api.new_key("attacker")
    CANARY.write_text("untouched")
    before = sorted(api.services.settings.data_dir.iterdir())
    count = 0
    with api.http(key) as http:
        for attack in attacks(api.services.engine.table, api.services.base.fingerprint):
            reply = http.post("/v1/adapters", data={"name": "evil"}, files={"file": attack.data})
            assert reply.status_code in (413, 422), (attack.name, reply.text)
            error = reply.json()["error"]
            assert error["code"] == attack.code, attack.name
            assert error["param"] == "file"
            assert "position" in error["message"] or attack.entry is None, attack.name
            count += 1
        assert count > 50
        assert http.get("/v1/adapters").json()["data"] == []
        assert http.get("/health/ready").status_code == 200
    assert CANARY.read_text() == "untouched"
    assert sorted(api.services.settings.data_dir.iterdir()) == before
    assert list((api.services.settings.data_dir / "store" / "spool").iterdir()) == []
