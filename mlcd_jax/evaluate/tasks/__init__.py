"""The tasks that a frozen encoder is scored by, one a file.

A task is a function run(data, config) -> metric -> value. `data` is a
features.Data, `config` the whole config. Values are floats, None or NaN where
undefined. A task that does not apply to an encoder or a data set returns {}.
To add one: write its file, and name it here and in `TASKS` of
config/choices.py.
"""

from mlcd_jax.evaluate.tasks import few_shot
from mlcd_jax.evaluate.tasks import finetune
from mlcd_jax.evaluate.tasks import knn
from mlcd_jax.evaluate.tasks import linear
from mlcd_jax.evaluate.tasks import multi_label
from mlcd_jax.evaluate.tasks import retrieval
from mlcd_jax.evaluate.tasks import zero_shot

RUN = {
  'linear': linear.run,
  'knn': knn.run,
  'few_shot': few_shot.run,
  'multi_label': multi_label.run,
  'zero_shot': zero_shot.run,
  'retrieval': retrieval.run,
  'finetune': finetune.run,
}
