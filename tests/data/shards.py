"""Small data sets in every layout, made by the tests themselves."""

import io
import json
import tarfile

from array_record.python import array_record_module
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_generated_pb2

from mlcd_jax import config as config_lib
from mlcd_jax.data import sources
from mlcd_jax.runtime import problems

NUM_CLASSES = 4


def data(source, path, **fields):
  """A config's `data`; what is made of the files is kept beside them."""
  found = config_lib.default().data
  found.source, found.path = source, str(path)
  found.cache_dir = f'{path}.cache'
  found.update(fields)
  return found


def opened(source, path, **fields):
  """The source and what was left out of it."""
  found = problems.Problems('test')
  return sources.make(data(source, path, **fields), found=found), found


def encode(pixels, kind='JPEG', **options):
  """uint8 pixels -> a file's bytes."""
  out = io.BytesIO()
  image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
  image.save(out, kind, **options)
  return out.getvalue()


def jpeg(number, size=(32, 40)):
  """A picture that depends on the number, bright where its class says."""
  pixels = np.random.default_rng(number).integers(0, 99, (*size, 3), np.uint8)
  label = number % NUM_CLASSES
  pixels[label * size[0] // 4 : (label + 1) * size[0] // 4] += 150
  return encode(pixels, quality=90)


def caption(number):
  """The caption of `jpeg(number)`."""
  return f'picture {number}'


def tar(path, members):
  """Writes (name, bytes) pairs."""
  with tarfile.open(path, 'w') as f:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      f.addfile(info, io.BytesIO(content))


def img2dataset(folder, num_shards=2, per_shard=40):
  """Tars as img2dataset writes them, with the parquet of all URLs.

  Every tenth download failed: it has a row in the parquet and no member.
  """
  number = 0
  for shard in range(num_shards):
    members, rows = [], []
    for place in range(per_shard):
      key = f'{shard:05d}{place:04d}'
      failed = place % 10 == 9
      rows.append(
        {
          'url': f'https://example.org/{key}.jpg',
          'key': key,
          'caption': caption(number),
          'status': 'failed_to_download' if failed else 'success',
        }
      )
      if not failed:
        members += [
          (f'{key}.jpg', jpeg(number)),
          (f'{key}.txt', caption(number).encode()),
          (f'{key}.json', json.dumps(rows[-1]).encode()),
          (f'{key}.cls', str(number % NUM_CLASSES).encode()),
        ]
      number += 1
    tar(folder / f'{shard:05d}.tar', members)
    pq.write_table(pa.Table.from_pylist(rows), folder / f'{shard:05d}.parquet')


def class_folders(folder, count=80):
  """folder/class/number.jpg."""
  for number in range(count):
    place = folder / f'class{number % NUM_CLASSES}'
    place.mkdir(parents=True, exist_ok=True)
    (place / f'{number:04d}.jpg').write_bytes(jpeg(number))


def parquet(path, count=80, images=None):
  """Writes images in a struct and classes in a note, as Hugging Face does."""
  images = images or [jpeg(number) for number in range(count)]
  features = {'label': {'names': [str(i) for i in range(NUM_CLASSES)]}}
  table = pa.table(
    {
      'image': [{'bytes': image, 'path': None} for image in images],
      'label': [number % NUM_CLASSES for number in range(len(images))],
      'caption': [caption(number) for number in range(len(images))],
    },
    metadata={'huggingface': json.dumps({'info': {'features': features}})},
  )
  pq.write_table(table, path, row_group_size=32)


def array_record(path, count=80, images=None, labels=None):
  """tf.train.Example messages, written without TensorFlow."""
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for number, image in enumerate(images or map(jpeg, range(count))):
    example = tf_example_generated_pb2.Example()
    feature = example.features.feature
    feature['image'].bytes_list.value.append(image)
    label = labels[number] if labels else number % NUM_CLASSES
    feature['label'].int64_list.value.append(label)
    feature['caption'].bytes_list.value.append(caption(number).encode())
    writer.write(example.SerializeToString())
  writer.close()


class MlcdTestPictures(tfds.core.GeneratorBasedBuilder):
  """The same pictures as a TFDS data set."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(
            shape=(None, None, 3), encoding_format='jpeg'
          ),
          'label': tfds.features.ClassLabel(num_classes=NUM_CLASSES),
          'caption': tfds.features.Text(),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for number in range(80):
      yield (
        number,
        {
          'image': io.BytesIO(jpeg(number)),
          'label': number % NUM_CLASSES,
          'caption': caption(number),
        },
      )
