"""The config fields of the evaluation."""

from mlcd_jax.config import choices
from mlcd_jax.config.field import EVALUATE
from mlcd_jax.config.field import Field
from mlcd_jax.config.field import MOST

FIELDS = (
  # Tasks, and data sets to evaluate on.
  Field(
    'evaluate.tasks',
    ('linear', 'knn', 'few_shot'),
    'Tasks to run, or all.',
    stages=(EVALUATE,),
  ),
  Field(
    'evaluate.baselines',
    choices.BASELINES,
    'Encoders to score beside the trained one: the embedder, the model '
    'before training (random), and pixels (raw); () = none.',
    stages=(EVALUATE,),
  ),
  Field(
    'evaluate.encoder',
    '',
    'An encoder to score without any earlier stage: a workdir or a '
    'checkpoint in it, a folder of `convert import`, of transformers or '
    "of OpenCLIP, or ORG/NAME[@REVISION]. '' = this run's.",
    stages=(EVALUATE,),
  ),
  Field(
    'evaluate.every_steps',
    0,
    'Evaluate inside training after so many steps, into metrics.jsonl; '
    '0 = never.',
    low=0,
    high=MOST,
  ),
  Field(
    'evaluate.batch_size',
    256,
    'Images a call, over all devices.',
    low=1,
    high=MOST,
  ),
  Field(
    'evaluate.finetune_epochs',
    10.0,
    'Epochs of fine-tuning.',
    low=0,
    high=1000000.0,
    stages=(EVALUATE,),
  ),
  Field(
    'evaluate.finetune_batch_size',
    128,
    'Images a step of fine-tuning.',
    low=1,
    high=MOST,
    stages=(EVALUATE,),
  ),
  Field(
    'evaluate.finetune_learning_rate',
    0.001,
    'Learning rate of fine-tuning.',
    low=0,
    high=1000.0,
    stages=(EVALUATE,),
  ),
  Field(
    'evaluate.finetune_layer_decay',
    0.75,
    'Factor of the learning rate from each layer to the one below.',
    low=0,
    high=1,
    stages=(EVALUATE,),
  ),
  Field(
    'evaluate.named',
    (),
    'Names of evaluate/datasets.py, or paper, to evaluate on as well.',
    stages=(EVALUATE,),
  ),
  Field(
    'evaluate.data_dir',
    '',
    "Folder of the named data sets; '' = TFDS's folder.",
    stages=(EVALUATE,),
  ),
  Field(
    'evaluate.datasets',
    {},
    'Labelled data sets by name, which mlcd_jax.config.add_dataset adds. '
    'Each says what to read, as data does, and names its splits.',
    stages=(EVALUATE,),
  ),
  # The text tower that zero_shot and retrieval tune to a frozen encoder. Its
  # other settings come from the optimizer section.
  Field(
    'lit.loss',
    'softmax',
    "softmax is CLIP's loss, sigmoid SigLIP's.",
    choices=('softmax', 'sigmoid'),
    stages=(EVALUATE,),
  ),
  Field(
    'lit.steps',
    0,
    "Steps of tuning; 0 = none: then only CLIP's folders, which have a "
    'text tower, do zero_shot and retrieval by texts.',
    low=0,
    high=MOST,
    stages=(EVALUATE,),
  ),
  Field(
    'lit.batch_size',
    256,
    'Pairs a step, over all devices.',
    low=1,
    high=MOST,
    stages=(EVALUATE,),
  ),
  Field(
    'lit.learning_rate',
    0.0005,
    'Peak learning rate.',
    low=0,
    high=1000.0,
    stages=(EVALUATE,),
  ),
  Field(
    'lit.width',
    512,
    'Width of the text tower.',
    low=1,
    high=65536,
    stages=(EVALUATE,),
  ),
  Field(
    'lit.depth',
    12,
    'Blocks of the text tower.',
    low=1,
    high=1024,
    stages=(EVALUATE,),
  ),
  Field(
    'lit.context',
    77,
    'Tokens; longer captions are cut.',
    low=3,
    high=1024,
    stages=(EVALUATE,),
  ),
  Field(
    'lit.dtype',
    'bfloat16',
    'Type of the products; weights stay float32.',
    choices=('float32', 'bfloat16'),
    stages=(EVALUATE,),
  ),
)
