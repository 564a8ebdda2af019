"""Words that set a cluster apart."""

from mlcd_jax.page import cluster_names


def test_names_are_what_others_do_not_have():
  found = cluster_names.from_captions(
    {
      3: ['a photo of a Red fox', 'a fox in the snow'],
      5: ['a photo of the sea', 'the sea at night'],
      8: ['the photo of a 7', 'a 7'],
      9: ['', ''],
    }
  )
  assert found[3].split()[0] == 'fox'
  assert found[5].split()[0] == 'sea'
  assert found[8] == '7'  # One character is a word.
  assert 9 not in found


def test_one_caption_does_not_name_a_cluster_by_repeating_itself():
  captions = ['spam spam spam spam', 'a tree', 'the tree', 'tree']
  assert cluster_names.from_captions({0: captions, 1: ['a sea']})[0] == 'tree'


def test_no_captions():
  assert cluster_names.from_captions({0: ['', ''], 1: []}) == {}
  assert cluster_names.from_captions({0: ['?!']}) == {}
