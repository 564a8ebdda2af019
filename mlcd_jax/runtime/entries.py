"""Folder listings without the files of operating systems and programs."""

from collections.abc import Callable
import os
import pathlib

# Names, in lower case, that macOS, Windows, Synology, QNAP, Linux and Python
# put into folders.
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
  """Returns whether a name is hidden or belongs to a system or program."""
  return name.startswith('.') or name.casefold() in _SYSTEM


def walk(root: str, unlisted: Callable[[str, OSError], None]) -> list[str]:
  """Returns the sorted paths of all files below a folder, relative to it.

  Links are followed, but each real folder is listed once: at its own place if
  that is below the root, and at the first link to it otherwise. A link to a
  folder that contains the root is not followed. A broken link counts as a file.

  Args:
    root: an existing folder.
    unlisted: called with the path of a folder that cannot be listed, and with
      the error.
  """
  real_root = os.path.realpath(root)
  seen = {real_root, *map(str, pathlib.PurePath(real_root).parents)}
  names = []
  folders, links = [('', real_root)], []
  while folders or links:
    # Links wait until all real folders are listed, so that a folder appears at
    # its own place and not at a link to it.
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
  """Returns whether an entry is a folder or a link to one."""
  try:
    return entry.is_dir()
  except OSError:  # The link cannot be followed, for example if it is a loop.
    return False


def _is_file(entry: os.DirEntry) -> bool:
  """Returns whether an entry is a file or a broken link.

  Devices and pipes are neither; reading them could block forever.
  """
  try:
    return entry.is_file() or not os.path.exists(entry.path)
  except OSError:
    return True
