"""The tasks that score a frozen encoder, one in each file.

A task is a function run(data, config) that returns a dict from metric to value.
`data` is a features.Data and `config` the whole config. Values are floats, and
None or NaN if undefined. A task that does not apply to an encoder or a data set
returns {}. To add a task, write its file and name it here and in `TASKS` of
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
