"""Which files belong together, by their names alone."""

import pytest

from mlcd_jax.embed import layouts
from mlcd_jax.runtime import errors

_SHARDS = range(12)


def names(*patterns):
  return sorted(pattern.format(i=i) for pattern in patterns for i in _SHARDS)


def find(files, texts=False):
  parts = layouts.find(files, 'root', texts=texts)
  layouts.check(parts, files, 'root')
  return parts


@pytest.mark.parametrize(
  ('rows', 'metadata', 'text'),
  [
    ('img_emb/img_emb_{i}.npy', 'metadata/metadata_{i}.parquet',
     'text_emb/text_emb_{i}.npy'),
    ('images/img_emb_{i}.npy', 'metadata/metadata_{i}.parquet',
     'texts/text_emb_{i}.npy'),
    ('img_emb/img_emb_{i:04d}.npy',
     'laion2B-en-metadata/metadata_{i}.parquet',
     'text_emb/text_emb_{i:05d}.npy'),
    ('images/{i:03d}.npy', 'metadata/{i:03d}.parquet', 'texts/{i:03d}.npy'),
    ('img_emb_{i}.npy', 'metadata_{i}.parquet', 'text_emb_{i}.npy'),
    ('x/img_emb_{i}.npy', 'y/metadata_{i:03d}.parquet', 'txt_{i}.npy'),
    ('embeddings/pd12m.{i:03d}.npy', 'metadata/pd12m.{i:03d}.parquet',
     'text_embeddings/pd12m.{i:03d}.npy'),
    ('embeddings/pd12m.{i:03d}.parquet', 'metadata/pd12m.{i:03d}.parquet', ''),
    ('part{i}.npy', 'part{i}.parquet', 'captions/part{i}.npy'),
    ('metadata/ab{i}.npz', 'metadata/ab{i}.parquet', 'metadata/ab{i}.npz'),
    ('emb-{i:05d}-of-00012.npy', 'keys-{i:05d}-of-00012.parquet', ''),
    ('{i}.parquet', '{i}.parquet', ''),
    ('img_emb/img_emb_{i}.npy', '', ''),
  ],
)  # fmt: skip
def test_files_are_paired(rows, metadata, text):
  files = names(*{rows, *filter(None, (metadata, text))})
  for texts in {False, bool(text)}:
    expected = {
      (rows.format(i=i), metadata.format(i=i), text.format(i=i) * texts)
      for i in _SHARDS
    }
    assert {tuple(part) for part in find(files, texts)} == expected


def test_the_nearest_folder_counts():
  files = names(
    'en/img_emb/img_emb_{i}.npy',
    'en/en-metadata/metadata_{i}.parquet',
    'multi/img_emb/img_emb_{i}.npy',
    'multi/multi-metadata/metadata_{i}.parquet',
    'multi/data/img_emb_{i}.parquet',
  )
  parts = find(files)
  assert len(parts) == 24
  for rows, metadata, _ in parts:
    folder = rows.partition('/')[0]
    number = rows.rpartition('_')[2].removesuffix('.npy')
    expected = f'{folder}/{folder}-metadata/metadata_{number}.parquet'
    assert metadata == expected


@pytest.mark.parametrize(
  ('drop', 'says'),
  [
    ({'metadata/metadata_3.parquet', 'metadata/metadata_4.parquet'},
     'root: no metadata with the keys of img_emb/img_emb_3.npy, '
     'img_emb/img_emb_4.npy; '),
    ({'img_emb/img_emb_7.npy'},
     'root: no embeddings to the metadata metadata/metadata_7.parquet; '),
    ({'text_emb/text_emb_5.npy'}, 'root/text_emb/text_emb_5.npy: missing'),
    (set(names('img_emb/img_emb_{i}.npy')), 'no embeddings of images'),
  ],
)  # fmt: skip
def test_what_is_missing_on_one_side_is_named(drop, says):
  files = names(
    'img_emb/img_emb_{i}.npy',
    'metadata/metadata_{i}.parquet',
    'text_emb/text_emb_{i}.npy',
  )
  files = [name for name in files if name not in drop]
  with pytest.raises(errors.UserError) as e:
    find(files, texts=True)
  assert says in str(e.value)


def test_two_of_a_number_are_named():
  with pytest.raises(errors.UserError, match='a/metadata_1.parquet, b/meta'):
    find(['img_emb_1.npy', 'a/metadata_1.parquet', 'b/metadata_1.parquet'])
  with pytest.raises(errors.UserError, match='keys of both b32/0.npy and l14'):
    find(['b32/0.npy', 'l14/0.npy', 'metadata/0.parquet'])
