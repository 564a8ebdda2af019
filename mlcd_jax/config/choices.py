"""The names that config fields may have."""

SOURCES = (
  'embedded',
  'tfds',
  'webdataset',
  'folder',
  'array_record',
  'parquet',
  'coco',
)
EMBEDDERS = ('hog', 'huggingface', 'precomputed', 'checkpoint')
LOSSES = ('mlcd', 'mlc', 'softmax', 'mean_softmax', 'sigmoid')
# In the order of the table; evaluate/stage.py has their functions.
TASKS = (
  'linear',
  'knn',
  'few_shot',
  'multi_label',
  'zero_shot',
  'retrieval',
  'finetune',
)

METRICS = (
  'accuracy',
  'mean_per_class',
  'mean_top1_top5',
  'roc_auc',
  'map_11_point',
)
