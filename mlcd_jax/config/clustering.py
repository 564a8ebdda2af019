"""The config fields of the cluster stage."""

from mlcd_jax.config import choices
from mlcd_jax.config.field import CLUSTER
from mlcd_jax.config.field import Field
from mlcd_jax.config.field import MOST

FIELDS = (
  Field(
    'cluster.num_centers',
    1000,
    'Number of centers; 0 = one for every 4 images, at most 1,000,000.',
    low=0,
    high=MOST,
    stages=(CLUSTER,),
  ),
  Field(
    'cluster.iterations',
    25,
    'Passes over the data.',
    low=1,
    high=MOST,
    stages=(CLUSTER,),
  ),
  Field(
    'cluster.tolerance',
    0.0,
    'Stop when the objective gains less than this share; 0 = never.',
    low=0,
    high=1,
    stages=(CLUSTER,),
  ),
  Field(
    'cluster.levels',
    (),
    '(k1, k2) = cluster in two levels on one machine: k1 coarse '
    'centers, and k2 in each on average, with k1 * k2 = num_centers. () '
    '= flat.',
    stages=(CLUSTER,),
  ),
  Field(
    'cluster.repair_iterations',
    2,
    'Flat passes after two levels.',
    low=1,
    high=MOST,
    stages=(CLUSTER,),
  ),
  Field(
    'cluster.method',
    'auto',
    'auto: on CPUs, compare a point with a few candidates where a '
    'sample shows that this costs little; see kmeans.fit. exact: '
    'compare every point with every center.',
    choices=('auto', 'exact'),
    stages=(CLUSTER,),
  ),
  Field(
    'cluster.fit_on',
    'images',
    'What the centers are fitted on: images, or the crops of embed.views.',
    choices=choices.FIT_ON,
    stages=(CLUSTER,),
  ),
  Field(
    'cluster.rule',
    'nearest',
    'Which centers become the labels of an image. nearest: those nearest to '
    'it. views: the nearest one of each of its views. pursuit: those that '
    'add up to it, or to the mean of its views, by matching pursuit.',
    choices=choices.RULES,
    stages=(CLUSTER,),
  ),
  Field(
    'cluster.num_labels',
    10,
    'The most labels that are stored for an image.',
    low=1,
    high=1024,
    stages=(CLUSTER,),
  ),
  Field(
    'cluster.path',
    '',
    'Another workdir, whose embeddings and clusters are read in place; '
    "'' = this run's.",
  ),
)
