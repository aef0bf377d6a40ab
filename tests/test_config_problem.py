"""What the configuration's names may be; its other mistakes are in test_config."""

import pytest

from dhlnn_jax.config_problem import one_of


def test_one_of_names_the_nearest():
    assert one_of("claim", "put", ("call", "put")) == "put"
    with pytest.raises(ValueError, match=r"unknown claim 'cal'; did you mean 'call'\? allowed: call, put"):
        one_of("claim", "cal", ("call", "put"))
    with pytest.raises(ValueError, match="unknown claim 'zzz'; allowed: call, put"):
        one_of("claim", "zzz", ("call", "put"))
