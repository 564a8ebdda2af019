"""The config fields of the data and of the embed stage."""

from mlcd_jax.config import choices
from mlcd_jax.config.field import EMBED
from mlcd_jax.config.field import EVALUATE
from mlcd_jax.config.field import Field
from mlcd_jax.config.field import MOST
from mlcd_jax.config.field import TRAIN

FIELDS = (
  # The images and their crops.
  Field(
    'data.source',
    'embedded',
    'Where the images come from.',
    choices=choices.SOURCES,
    stages=(EMBED, TRAIN, EVALUATE),
  ),
  Field(
    'data.path',
    '',
    "tfds: the data set's name. coco: the folder with annotations/ and "
    'a folder of images for each split. Otherwise a path, glob or range '
    'such as {00000..00099}, local or an fsspec URL; {split} stands for '
    'the split.',
    stages=(EMBED, TRAIN, EVALUATE),
  ),
  Field(
    'data.data_dir',
    '',
    "tfds: the folder where it was prepared; '' = TFDS's default.",
    stages=(EMBED, TRAIN, EVALUATE),
  ),
  Field(
    'data.split',
    'train',
    'The split that is clustered and trained on.',
    stages=(EMBED, TRAIN, EVALUATE),
  ),
  Field(
    'data.image_key',
    'image',
    'The feature or column of the image; in tars, its suffix.',
    stages=(EMBED, TRAIN, EVALUATE),
  ),
  Field(
    'data.label_key',
    'label',
    'The same of the class, which only evaluation uses.',
  ),
  Field(
    'data.caption_key',
    'caption',
    'The same of the caption.',
    stages=(EMBED, EVALUATE),
  ),
  Field(
    'data.attributes_key',
    '',
    'tfds: the feature with several labels an image, such as objects/label. '
    'The labels of the clusters are measured by them; nothing is trained on '
    'them.',
  ),
  Field(
    'data.boxes_key',
    '',
    'tfds: the feature with the boxes of the objects, such as objects/bbox.',
  ),
  Field(
    'data.bad_keys',
    '',
    "A file with keys to leave out; '' = bad_keys.txt in the workdir.",
  ),
  Field(
    'data.cache_dir',
    '',
    "Folder for indices and copies; '' = ~/.cache/mlcd_jax.",
  ),
  Field(
    'data.num_workers',
    0,
    'Decoding processes, for machines with more than 16 cores; 0 = threads.',
    low=0,
    high=1024,
  ),
  Field(
    'data.max_bad_fraction',
    0.01,
    'A larger share of bad images stops the run.',
    low=0,
    high=1,
  ),
  Field(
    'data.crop_area',
    (0.7, 1.0),
    'Smallest and largest share of the image that a training crop keeps.',
    stages=(TRAIN, EVALUATE),
  ),
  Field(
    'data.flip',
    True,
    'Mirror half of the training crops.',
    stages=(TRAIN, EVALUATE),
  ),
  # The embed stage.
  Field(
    'embed.embedder',
    'hog',
    'What embeds the images.',
    choices=choices.EMBEDDERS,
    stages=(EMBED,),
  ),
  Field(
    'embed.path',
    '',
    'huggingface: an encoder, named as in evaluate.encoder. '
    'precomputed: a folder or fsspec URL of embeddings made elsewhere. '
    'checkpoint: a workdir, whose encoder embeds.',
    stages=(EMBED,),
  ),
  Field(
    'embed.column',
    '',
    "precomputed: the array of an .npz ('' = l14_img), or the column of "
    'Parquet.',
    stages=(EMBED,),
  ),
  Field(
    'embed.text_weight',
    0.0,
    'precomputed: share of the unit text embeddings in the features.',
    low=0,
    high=1,
    stages=(EMBED,),
  ),
  Field(
    'embed.dtype',
    'float32',
    "Type of a model's products.",
    choices=('float32', 'bfloat16'),
    stages=(EMBED,),
  ),
  Field(
    'embed.image_size',
    0,
    "Pixels; 0 = the embedder's own.",
    low=0,
    high=16384,
    stages=(EMBED,),
  ),
  Field(
    'embed.batch_size', 64, 'Images per device and call.', low=1, high=MOST
  ),
  Field(
    'embed.shard_rows',
    65536,
    'Records per embedding file.',
    low=1,
    high=MOST,
    stages=(EMBED,),
  ),
  Field(
    'embed.views',
    (),
    'Grids of overlapping crops that are embedded too: (2, 3) = 4 + 9 '
    'crops of each image. () = none.',
    stages=(EMBED,),
  ),
)
