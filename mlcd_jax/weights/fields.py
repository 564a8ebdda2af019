"""Lists the config fields that do not affect features, and checks the others.

The lists were read from the code of transformers 5.23 and OpenCLIP 3.3. Fields
that are applied are listed where they are read. A field in neither list is one
that those two packages do not know.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import functools
import logging
import pathlib
from typing import Any

from mlcd_jax.runtime import errors

_log = logging.getLogger(__name__)

# Fields that any config.json may have. They concern training, classification,
# generation, the type of the weights and the program that wrote the file.
_ANY_MODEL = frozenset(
  """
  _attn_implementation _attn_implementation_autoset _commit_hash
  _experts_implementation _name_or_path add_cross_attention architectures
  attn_implementation bad_words_ids base_model_prefix begin_suppress_tokens
  bos_token_id chunk_size_feed_forward cross_attention_hidden_size
  decoder_start_token_id diversity_penalty do_sample dropout dtype
  early_stopping encoder_no_repeat_ngram_size eos_token_id
  exponential_decay_length_penalty finetuning_task forced_bos_token_id
  forced_eos_token_id gradient_checkpointing id2label is_decoder
  is_encoder_decoder label2id length_penalty max_length min_length model_type
  name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
  num_return_sequences output_attentions output_hidden_states output_scores
  pad_token_id prefix problem_type remove_invalid_values repetition_penalty
  return_dict return_dict_in_generate sep_token_id suppress_tokens
  task_specific_params temperature tf_legacy_loss tie_encoder_decoder
  tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
  transformers.js_config transformers_version typical_p use_bfloat16 use_cache
  """.split()
)
# Fields of a tower: drop-out and initial values, which only training uses, the
# outputs of `AutoBackbone`, and sizes that the shapes of the weights give.
_TOWER = frozenset(
  """
  apply_layernorm attention_dropout attention_probs_dropout_prob drop_path_rate
  hidden_dropout_prob initializer_factor initializer_range layerscale_value
  logit_scale_init_value max_position_embeddings out_features out_indices
  projection_dim projection_size reshape_hidden_states stage_names
  text_config use_mask_token vocab_size
  """.split()
)
CONFIG = _ANY_MODEL | _TOWER

# Fields of an image processor. Images are RGB here already, and squares of one
# size, which always stack.
PROCESSOR = frozenset(
  """
  _processor_class _valid_processor_keys data_format device disable_grouping
  do_convert_rgb feature_extractor_type image_processor_type image_seq_length
  input_data_format processor_class return_tensors use_fast
  """.split()
)

# Fields of OpenCLIP's vision_cfg: drop-out, and settings of attention poolers
# and timm's towers. The fields that switch those on are refused.
OPEN_CLIP_VISION = frozenset(
  """
  attn_pooler_heads attn_pooler_queries output_tokens patch_dropout timm_drop
  timm_drop_path timm_model_pretrained timm_pool timm_proj timm_proj_bias
  """.split()
)
# Fields of OpenCLIP's model_cfg: types, the text tower and the loss.
OPEN_CLIP_MODEL = frozenset(
  """
  cast_dtype custom_text init_logit_bias init_logit_scale multimodal_cfg
  nonscalar_logit_scale output_dict text_cfg
  """.split()
)
# Fields of OpenCLIP's preprocess_cfg. It sets `size` to that of the model, and
# the fill color matters only with resize_mode=longest, which is refused.
OPEN_CLIP_PIXELS = frozenset({'fill_color', 'size'})


def check_fixed(
  path: pathlib.Path, config: Mapping[str, Any], fixed: Mapping[str, Any]
) -> None:
  """Raises UserError if a field has another value than the supported one.

  Args:
    path: the file that errors name.
    config: the fields of the file; those it leaves out are fine.
    fixed: the supported value of each field.
  """
  for name, value in fixed.items():
    other = config.get(name, value)
    if other != value and (other or value):  # null, [] and {} all mean off.
      raise errors.UserError(
        f'{path}: {name}={other!r} is not supported, only {value!r}'
      )


def refuse_unknown(
  path: pathlib.Path, config: Mapping[str, Any], known: Iterable[str]
) -> None:
  """Raises UserError if an unknown field is switched on.

  Args:
    path: the file that errors name.
    config: the fields of the file.
    known: the names of the known fields.
  """
  names = _unknown(config, known)
  if names:
    shown = ', '.join(f'{name}={config[name]!r}' for name in names)
    raise errors.UserError(
      f'{path}: {shown} is not supported; remove it if it has no effect on '
      'features'
    )


def report_unknown(
  path: pathlib.Path, config: Mapping[str, Any], known: Iterable[str]
) -> None:
  """Warns once of unknown fields, which `transformers` ignores too.

  Args:
    path: the file that the warning names.
    config: the fields of the file.
    known: the names of the known fields.
  """
  names = _unknown(config, known)
  if names:
    say(f'{path}: not known, so without effect: {", ".join(names)}')


@functools.cache
def say(message: str) -> None:
  """Logs a warning; the same message is logged only once per process."""
  _log.warning('%s', message)


def _unknown(config: Mapping[str, Any], known: Iterable[str]) -> list[str]:
  """Returns the names of unknown fields that are not null, 0, '' or empty."""
  known = frozenset(known)
  return [name for name, value in config.items() if value and name not in known]
