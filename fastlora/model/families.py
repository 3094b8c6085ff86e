"""Tables of attention and MLP blocks and of task heads, by structure and name: a model family is one entry."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """An attention block: its input projections and its output projection, by name below the owner."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]  # alternatives, first found; a leading "^" looks below the owner's parent
    shared: bool = True  # whether inputs of one width are expected to have one input

    @property
    def fused(self) -> bool:
        """Whether the inputs are one matrix, which may be in slices."""
        return len(self.inputs) == 1


ATTENTION = (
    Attention(("qkv",), ("proj", "out_proj", "projection", "to_out", "^output.dense")),
    Attention(("qkv.linear",), ("proj.ln.linear",)),
    Attention(("qkv.conv",), ("proj.conv",)),
    Attention(("qkv.c",), ("proj.1.c",)),
    Attention(("qkvs.*.conv",), ("proj.1.conv",)),  # a convolution a head
    Attention(("pwise",), ("o_proj",)),
    Attention(("queries_keys_values.linear",), ("projection.linear",)),
    Attention(("in_proj",), ("out_proj", "attn_out_proj", "^output.dense")),
    Attention(("q_attn", "c_attn"), ("c_proj",)),  # GPT-2's cross-attention: k and v are one matrix
    Attention(("c_attn",), ("c_proj",)),
    Attention(("att_proj",), ("out_proj",)),
    Attention(("query_key_value",), ("dense",)),
    Attention(("qkv_proj",), ("o_proj", "out_proj")),
    Attention(("qkv_proj.convolution",), ("out_proj.convolution",)),
    Attention(("Wqkv",), ("Wo", "out_proj")),
    Attention(("to_qkv",), ("merge", "to_out.0", "to_out", "^proj_out")),
    Attention(("to_added_qkv",), ("to_add_out",)),
    Attention(("to_added_kv",), ()),
    Attention(("to_qkv_mlp_proj",), ("to_out",)),
    Attention(("img_qkv_proj",), ("to_out.0",)),
    Attention(("txt_kv_proj",), ()),
    Attention(("qkv_linear",), ("^output.dense",)),
    Attention(("q", "kv"), ("proj",)),
    Attention(("q.ln.linear", "kv.linear"), ("proj.ln.linear",)),
    Attention(("queries.linear", "keys_values.linear"), ("projection.linear",)),
    Attention(("to_q", "to_kv"), ("to_out.0", "to_out")),
    Attention(("qk", "v"), ("proj",)),
    # Latent attention: down-projections of the input, and what they give projected up.
    Attention(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"), ("o_proj",), shared=False),
    Attention(("q_proj", "kv_a_proj_with_mqa", "kv_b_proj"), ("o_proj",), shared=False),
    Attention(("q_a_proj", "q_gate_proj", "kv_a_proj_with_mqa", "kv_b_proj"), ("o_proj",), shared=False),
    Attention(("q_a_proj", "q_b_proj", "kv_proj"), ("o_b_proj",), shared=False),
    Attention(("query", "key", "value"), ("^output.dense", "dense", "proj", "projection_layer", "out_proj", "^output")),
    Attention(("query_global", "key_global", "value_global"), ()),
    Attention(("query_proj", "key_proj", "value_proj"), ("^output.dense", "out_proj")),
    Attention(("projection_query", "projection_key", "projection_value"), ("^output.dense",)),
    Attention(("project_q", "project_k", "project_v"), ("attention_out",)),
    Attention(("linear_q", "linear_k", "linear_v"), ("linear_out",)),
    Attention(("Wq", "Wk", "Wv"), ("dense",)),
    Attention(("q_proj", "k_proj", "v_proj_current", "v_proj_delayed"), ("o_proj", "out_proj"), shared=False),
    Attention(("q_content_proj", "k_content_proj", "v_proj"), ("o_proj",), shared=False),  # positions have their own
    Attention(("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "proj", "dense", "projection_layer")),
    Attention(("q_proj.linear", "k_proj.linear", "v_proj.linear"), ("o_proj.linear",)),
    Attention(("add_q_proj", "add_k_proj", "add_v_proj"), ("to_add_out",)),
    Attention(("q_lin", "k_lin", "v_lin"), ("out_lin",)),
    Attention(("q_head", "k_head", "v_head"), ("post_proj",)),
    Attention(("to_q", "to_k", "to_v"), ("to_out.0", "to_out", "^proj_out")),
    Attention(("to_q_t", "to_k_t", "to_v_t"), ("to_out_t",)),
    Attention(("add_k_proj", "add_v_proj"), ()),
    Attention(("wq", "wk", "wv"), ("wo", "proj")),
    Attention(("q", "k", "v"), ("o", "proj")),
    Attention(("q.conv", "k.conv", "v.conv"), ("proj.conv",)),
    Attention(("q.proj.conv", "k.conv", "v.conv"), ("proj.conv",), shared=False),
    Attention(("query.proj", "key.proj", "value.proj"), ("output.proj",)),
    Attention(("to_query", "to_key", "to_value"), ("out_layer",)),
    Attention(("to_query", "to_key"), ("final",)),  # additive attention, which has no v
    Attention(("k_proj", "v_proj"), ("output_proj",)),  # of a pool whose queries are parameters
)

MLP = (
    ("fc1", "fc2"),
    ("fc1_g", "fc1_x", "fc2"),
    ("fc_1", "fc_2", "proj"),
    ("fc", "proj"),
    ("linear1", "linear2"),
    ("linear_1", "linear_2", "linear_3"),
    ("linear_1", "linear_2", "out_projection"),
    ("linear_in", "linear_out"),
    ("linear_fc1", "linear_fc2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_proj", "up_proj", "linear_fc2"),
    ("gate_proj.linear", "up_proj.linear", "down_proj.linear"),
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("gate_proj", "down_proj"),
    ("intermediate.dense", "output.dense"),
    ("intermediate_query.dense", "output_query.dense"),
    ("intermediate_dense", "output_dense"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("ffn", "ffn_output"),
    ("lin1", "lin2"),
    ("wi_0", "wi_1", "wo"),
    ("wi", "wo"),
    ("Wi", "Wo"),
    ("w0", "w1", "w2"),
    ("w1", "w2", "w3"),
    ("w_in.w_0", "w_in.w_1", "w_out"),
    ("dense1", "dense2"),
    ("layer_1", "layer_2"),
    ("pwconv1", "pwconv2"),
    ("net.0.proj", "net.2"),
    ("proj_mlp", "proj_out"),  # proj_out has the attention's columns, too
    ("feed_forward.in_layer", "feed_forward.out_layer"),
    ("channelwise.0", "channelwise.4"),
    ("ff.0", "ff.3"),
    ("mlp.0", "mlp.3"),
    ("mlp_layer.1", "mlp_layer.3"),
)

# Of owners whose class says that they are an MLP, which may also be of convolutions over channels: others of these
# names are gates of channels (squeeze and excite), projectors, or residual blocks.
NAMED_MLP = (
    ("linear_1", "linear_2"),
    ("fc1.conv", "fc2.conv"),
    ("conv1", "conv3"),
    ("conv1", "conv2"),
    ("conv1.convolution", "conv2.convolution"),
    ("pw1.conv", "pw2.conv"),
    ("pw1.c", "pw2.c"),
)
SAYS_MLP = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)

# Parts of the paths of networks that make positions, which are no MLPs of the model's stream.
POSITIONS = re.compile(
    r"rel_pos|relative_position|pos_mlp|pos_embed|pos_proj|meta_mlp|cpb|dpb|(^|\.)(pos|position)(\.|$)"
)

# Owners that mix tokens without attention: their projections have no q, k and v.
MIXERS = re.compile(r"(Mixer|MambaLayer|ShortConv|GatedDeltaNet|RecurrentBlock|mLSTMLayer|RwkvSelfAttention)$")

# First component of the path of a task head.
HEADS = (
    "head", "head_dist", "heads", "classifier", "pre_classifier", "classification_head", "lm_head", "score", "fc",
    "qa_outputs",
)  # fmt: skip
