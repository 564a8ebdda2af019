"""What lies in folders, without what systems and programs put there."""

from collections.abc import Callable
import os
import pathlib

# In lower case: macOS, Windows, Synology, QNAP and Linux.
_SYSTEM = frozenset(
  {
    '__macosx',
    'icon\r',
    'thumbs.db',
    'ehthumbs.db',
    'desktop.ini',
    '$recycle.bin',
    'recycler',
    'system volume information',
    '@eadir',
    '@recycle',
    '@recently-snapshot',
    '#recycle',
    '#snapshot',
    'lost+found',
    '__pycache__',
  }
)


def is_system(name: str) -> bool:
  """Whether an entry of this name is none of the user's data."""
  return name.startswith('.') or name.casefold() in _SYSTEM


def walk(root: str, unlisted: Callable[[str, OSError], None]) -> list[str]:
  """Returns the files below a folder, relative to it, in order.

  Links are followed, but each real folder is taken once: at its own place if
  that is below the root, else at the first link in order; and links to folders
  that hold the root are not followed. Links to nothing are among the files.

  Args:
    root: an existing folder.
    unlisted: gets the path of a folder that cannot be listed, and the error.
  """
  real_root = os.path.realpath(root)
  seen = {real_root, *map(str, pathlib.PurePath(real_root).parents)}
  names = []
  folders, links = [('', real_root)], []
  while folders or links:
    if folders:
      folder, real = folders.pop()
    else:
      links.sort(reverse=True)
      folder = links.pop()
      real = os.path.realpath(os.path.join(root, folder))
      if real in seen:
        continue
      seen.add(real)
    try:
      with os.scandir(os.path.join(root, folder)) as found:
        entries = [entry for entry in found if not is_system(entry.name)]
    except OSError as e:
      unlisted(os.path.join(root, folder), e)
      continue
    for entry in entries:
      name = f'{folder}/{entry.name}' if folder else entry.name
      if not _is_folder(entry):
        if _is_file(entry):
          names.append(name)
      elif entry.is_symlink():
        links.append(name)
      else:
        real_entry = os.path.join(real, entry.name)
        if real_entry not in seen:
          seen.add(real_entry)
          folders.append((name, real_entry))
  return sorted(names)


def _is_folder(entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # A link that cannot be followed.
    return False


def _is_file(entry: os.DirEntry) -> bool:
  """Whether it is a file or a link to nothing, and no device or pipe."""
  try:
    return entry.is_file() or not os.path.exists(entry.path)
  except OSError:
    return True
