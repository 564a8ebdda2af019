"""Finds the files with image embeddings, text embeddings and keys in a folder.

Common layouts name and number their files in different ways:
  clip-retrieval: img_emb/img_emb_0.npy, metadata/metadata_0.parquet;
  LAION-400M: images/, texts/, metadata/;
  LAION-5B: img_emb/, laion2B-en-metadata/metadata_0000.parquet;
  DataComp: x.npz beside x.parquet;
  others: embeddings/x.npy, metadata/x.parquet.
So the words in a path tell the kind of a file, and files are paired by name or
else by number.
"""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import os
import pathlib
import re
from typing import NamedTuple

from mlcd_jax.runtime import errors

# Whole words of a path that tell the kind of a file. The first kind that
# matches counts, so a file with words of images and texts is of images.
_WORDS = {
  kind: re.compile(rf'(?i)(?<![a-z])({words})s?(?![a-z])')
  for kind, words in (
    ('image', 'img|image'),
    ('text', 'txt|text|caption'),
    ('keys', 'metadata|meta|key'),
  )
}


class Part(NamedTuple):
  """The files of one shard of embeddings.

  Paths are relative to the folder; '' means that there is no such file.

  Attributes:
    rows: the embeddings of images.
    metadata: the Parquet file with their keys.
    text: the embeddings of their texts.
  """

  rows: str
  metadata: str
  text: str


def find(names: Sequence[str], root: str, *, texts: bool) -> list[Part]:
  """Returns the files of embeddings in order, each with its keys and texts.

  Args:
    names: the paths of all files, relative to the folder.
    root: the folder that an error names.
    texts: True to find the embeddings of texts too.

  Raises:
    UserError: there are no embeddings, or files cannot be paired.
  """
  rows, text_rows = _rows(names)
  if not rows:
    raise errors.UserError(
      f'embed.path={root}: no embeddings of images; it needs img_emb/*.npy, or '
      '.npz, .npy or .parquet files'
    )
  metadata = _metadata(rows, names, root)
  if not texts or rows[0].endswith('.npz'):  # An .npz holds both.
    return list(map(Part, rows, metadata, rows if texts else [''] * len(rows)))
  found = _paired(rows, text_rows, root)
  for row, text in zip(rows, found):
    if not text:
      raise errors.UserError(
        f'{root}/{row.replace("img_emb", "text_emb")}: missing; '
        'embed.text_weight needs it, or set embed.text_weight=0'
        if text_rows or 'img_emb' in row
        else f'embed.text_weight: {root} has no text_emb/ beside an img_emb/; '
        'set embed.text_weight=0'
      )
  return list(map(Part, rows, metadata, found))


def check(parts: Sequence[Part], names: Sequence[str], root: str) -> None:
  """Checks that embeddings and metadata files are complete.

  Args:
    parts: the result of `find`.
    names: the paths of all files, as given to `find`.
    root: the folder that an error names.

  Raises:
    UserError: embeddings lack their metadata, or the reverse.
  """
  alone = [part.rows for part in parts if not part.metadata]
  if alone and len(alone) < len(parts):
    raise errors.UserError(
      f'{root}: no metadata with the keys of {_some(alone)}; put its Parquet '
      'file there, or take these embeddings away'
    )
  used = {part.metadata for part in parts}
  apart = used - {_beside(part.rows) for part in parts}
  alone = [
    name
    for name in names
    if _is_metadata(name) and _number(name) is not None and name not in used
  ]
  if apart and alone:
    raise errors.UserError(
      f'{root}: no embeddings to the metadata {_some(alone)}; put them there, '
      'or take these files away'
    )


def _some(names: Sequence[str]) -> str:
  """Returns the first three names and the number of others, for an error."""
  more = f' and {len(names) - 3} more' * (len(names) > 3)
  return ', '.join(names[:3]) + more


def _kind(name: str) -> str:
  """Returns the kind of a file by the words in its path, or ''.

  The file name counts first, then the folders from the innermost outwards.
  """
  for part in reversed(name.split('/')):
    for kind, words in _WORDS.items():
      if words.search(part):
        return kind
  return ''


def _is_metadata(name: str) -> bool:
  """Returns whether a path is that of a Parquet file of keys, by its words."""
  return name.endswith('.parquet') and _kind(name) == 'keys'


def _rows(names: Sequence[str]) -> tuple[list[str], list[str]]:
  """Returns the files of image embeddings and those of text embeddings.

  The first pair of suffix and kinds that matches a file decides.
  """
  for suffix, kinds in (
    ('.npy', ('image',)),
    ('.npz', ('image', 'keys', '')),
    ('.npy', ('keys', '')),
    ('.parquet', ('image',)),
    ('.parquet', ('',)),
    ('.parquet', ('keys',)),
  ):
    of_type = [name for name in names if name.endswith(suffix)]
    if suffix == '.parquet' and any(n.endswith('.npy') for n in names):
      # All .npy files are of texts here, so the Parquet files hold their keys
      # and no embeddings.
      break
    rows = [name for name in of_type if _kind(name) in kinds]
    if rows:
      return rows, [name for name in of_type if _kind(name) == 'text']
  return [], []


def _metadata(
  rows: Sequence[str], names: Sequence[str], root: str
) -> list[str]:
  """Returns the Parquet file with the keys for each of the rows, or ''."""
  there = set(names)
  beside = [n if (n := _beside(row)) in there else '' for row in rows]
  if all(beside) and not rows[0].endswith('.parquet'):
    return beside
  marked = [n for n in names if _is_metadata(n) and n not in rows]
  found = _paired(rows, marked, root)
  # Without files that are marked as metadata, any Parquet file of the same name
  # will do. Numbers alone would pair unrelated files.
  if not marked:
    others = [n for n in names if n.endswith('.parquet')]
    found = _paired(rows, others, root, by=(_stem,))
  found = [a or b for a, b in zip(found, beside)]
  for name, count in collections.Counter(filter(None, found)).items():
    if count > 1:
      same = [row for row, other in zip(rows, found) if other == name]
      raise errors.UserError(
        f'{root}/{name}: keys of both {same[0]} and {same[1]}; name the folder '
        'of one of them in embed.path'
      )
  return found


def _beside(row: str) -> str:
  """Returns the path of the Parquet file with the same name and folder."""
  return row.rpartition('.')[0] + '.parquet'


def _stem(name: str) -> str:
  """Returns the base name of a path, without suffix."""
  return pathlib.PurePosixPath(name).stem


def _number(name: str) -> int | None:
  """Returns the number of a file: 12 for metadata_0012, 1 for a-1-of-2."""
  stem = re.sub(r'-of-\d+', '', _stem(name))
  numbers = re.findall(r'\d+', stem)
  # The number of the shard is the last one in the name.
  return int(numbers[-1]) if numbers else None


def _paired(
  rows: Sequence[str],
  others: Sequence[str],
  root: str,
  *,
  by: Sequence[Callable[[str], str | int | None]] = (_stem, _number),
) -> list[str]:
  """Returns the file that belongs to each of `rows`, or ''.

  Args:
    rows: the files of embeddings.
    others: the files to choose from.
    root: the folder that an error names.
    by: functions of a path; files with the same value belong together. Later
      functions apply only to rows without a pair.

  Returns:
    For each row the match with the most leading folders in common.

  Raises:
    UserError: several matches are equally near.
  """
  found = [''] * len(rows)
  for mark in by:
    marked = collections.defaultdict(list)
    for name in others:
      marked[mark(name)].append(name)
    for i, row in enumerate(rows):
      same = marked.get(mark(row), [])
      # Several folders may have files of this number; the nearest belongs here.
      near = [_common_folders(row, name) for name in same]
      if found[i] or not same:
        continue
      found[i] = same[near.index(max(near))]
      if near.count(max(near)) > 1:
        raise errors.UserError(
          f'{root}/{row}: {_some(same)} are all of its number; leave one, or '
          'name a folder with one of them in embed.path'
        )
  return found


def _common_folders(a: str, b: str) -> int:
  """Returns the number of leading folders that two paths share."""
  return len(os.path.commonprefix([a.split('/')[:-1], b.split('/')[:-1]]))
