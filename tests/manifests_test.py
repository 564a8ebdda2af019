"""Manifests of older versions."""

import pytest

from mlcd_jax import manifests
from mlcd_jax.runtime import errors


def test_a_renamed_field_is_compared_by_its_new_name():
  for old, new in ('auto', 'auto'), ('off', 'exact'):
    made_with = {'cluster.screening': old}
    manifests.check_same(made_with, {'cluster.method': new}, 'clusters')
    assert made_with == {'cluster.screening': old}
  with pytest.raises(errors.UserError, match="cluster.method='exact'"):
    manifests.check_same(
      {'cluster.screening': 'off'}, {'cluster.method': 'auto'}, 'clusters'
    )
