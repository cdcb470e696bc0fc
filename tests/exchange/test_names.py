"""Names and shapes in foreign files are compared with those of the base."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.names import check_known, check_names, shape_of
from tests.exchange.support import shapes_only

NAME, EMBEDDING, HEAD = "model.q.weight", "model.embed_tokens.weight", "lm_head.weight"
BASE = shapes_only({NAME: (12, 10)})
TIED = replace(BASE, aliases={HEAD: EMBEDDING})


def test_a_tied_parameter_is_known_under_both_names() -> None:
    assert shape_of(TIED, HEAD) == shape_of(TIED, EMBEDDING) == (32, 10)
    assert shape_of(BASE, HEAD) is None
    check_known(TIED, {HEAD: (32, 10), NAME: None})
    for base, shape in ((BASE, None), (TIED, (10, 32))):
        with pytest.raises(AdapterFileError) as refused:
            check_known(base, {HEAD: shape})
        assert (refused.value.code, refused.value.tensor) == ("base_model_mismatch", HEAD)
    with pytest.raises(AdapterFileError) as refused:
        check_names(TIED, {HEAD: None})
    assert (refused.value.code, refused.value.tensor) == ("unsupported_module", HEAD)


def test_a_shape_of_any_length_is_shown_short() -> None:
    with pytest.raises(AdapterFileError) as refused:
        check_known(BASE, {NAME: (1,) * 1_000_000})
    assert "1×1×1×1×1×1×1×1×…, 12×10 here" in refused.value.message
    assert len(refused.value.message) < 200
