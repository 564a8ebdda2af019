"""The allowed values of config fields that several modules use."""

# data/sources.py maps each to the function that opens it.
SOURCES = (
  'embedded',
  'tfds',
  'webdataset',
  'folder',
  'array_record',
  'parquet',
  'coco',
)
# The sources with several labels an image, and those with boxes.
WITH_ATTRIBUTES = ('embedded', 'tfds', 'coco')
WITH_BOXES = ('embedded', 'tfds')
# The values of data.path where data.source=embedded; '' is digits.
EMBEDDED = (
  'digits',
  'scenes',
  'scenes/quadrants',
  'scenes/crowded',
)
# embed/embedders.py makes each.
EMBEDDERS = ('hog', 'huggingface', 'precomputed', 'checkpoint')
FIT_ON = ('images', 'views')
# cluster/rules.py maps each to a function.
RULES = ('nearest', 'views', 'pursuit')
LOSSES = ('mlcd', 'mlc', 'softmax', 'mean_softmax', 'sigmoid')
# In the order of the printed table. evaluate/tasks/__init__.py maps each to a
# function.
TASKS = (
  'linear',
  'knn',
  'few_shot',
  'multi_label',
  'zero_shot',
  'retrieval',
  'finetune',
)
# The encoders that evaluate/stage.py scores beside the trained one.
BASELINES = ('embedder', 'random', 'raw')

METRICS = (
  'accuracy',
  'mean_per_class',
  'mean_top1_top5',
  'roc_auc',
  'map_11_point',
)
