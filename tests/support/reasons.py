"""Why each case of ``hostile`` is refused: words of its error, as a regular expression."""

from __future__ import annotations

__all__ = ["LOW", "REASONS"]

# Codec -> class of the error -> words of it -> names of cases.
REASONS: dict[str, dict[str, dict[str, str]]] = {
    "pickle": {
        "UnsafeObjectError": {
            "is blocked": "os posix sys named_only",
            "was not an allowed global by default": """
                builtins builtins_of_python_2 eval getattr import io pickle torch_function
                torch.hub copyreg subprocess class dotted numpy numpy_1 FloatTensor
                FloatTensor_new FloatStorage UntypedStorage UntypedStorage_new TypedStorage
            """,
            "a global whose name has": "long_name",
            "only name it": "Tensor Parameter",
            "which is not a class here": """
                Tensor_new Parameter_new new_of_function new_of_checked new_of_int
            """,
            "from a str, in latin-1": """
                bytearray bytearray_of_list set_of_bytearray hex punycode idna utf-16
                encode_errors codec_of_no_str
            """,
            r"arguments of bytes\(\)": "bytes",
            "make a set from a list": "set_of_bytes set_of_str set_of_tuple set_of_dict set_of_set",
            "name a layout by a str, not by tuple": "doubled_text_as_layout",
            "a device from its type and index": "device_of_tuple",
            "a Size from a tuple": "size_of_list size_of_tensor",
            r"OrderedDict\(\) without arguments": "ordered_dict_of_items",
            "a Counter from a dict": "counter_of_list counter_of_counter",
            "a device tensor from a tensor of torch.float64": "cast",
            "Trying to call reduce for unrecognized function": """
                call_of_int call_of_made call_of_tensor
            """,
            "given a state with BUILD": """
                state_of_tensor state_of_rebuilt state_of_parameter state_of_list
                state_of_counter state_of_global state_of_size
            """,
            "persistent_load id must be tuple or int": "reference_of_str reference_of_none",
            "rebuilds a tensor with": """
                doubled_function from_type_of_call from_type_args_list
            """,
            "must be a tensor class": """
                doubled_class from_type_of_none from_type_of_dtype wrapper_of_tensor
            """,
            "that is no dict": """
                state_of_pairs state_of_tuple_of_pairs state_of_set state_of_dict_made
                state_as_tensor
            """,
            "which is not a dict": "items_of_tensor many_items_of_tensor items_of_list",
            "which is not a list": "append_to_tensor append_to_int extend_dict",
            "attribute .* of a (Tensor|Parameter)": """
                attribute_data parameter_data attribute_sum parameter_sum attribute___class__
                parameter___class__ attribute___array_interface__
                parameter___array_interface__ attribute___array_struct__
                parameter___array_struct__ attribute_grad parameter_grad attribute_shape
                parameter_shape attribute___dict__ parameter___dict__
                attribute__backward_hooks parameter__backward_hooks attribute_requires_grad
                parameter_requires_grad attribute___anything__ parameter___anything__
                attribute__is_param parameter__is_param attribute_slots attribute_number
            """,
            "opcode .* is not allowed": """
                opcode_INT opcode_LONG opcode_LONG4 opcode_STRING opcode_BINSTRING
                opcode_BINBYTES opcode_SHORT_BINBYTES opcode_BINBYTES8 opcode_BYTEARRAY8
                opcode_NEXT_BUFFER opcode_READONLY_BUFFER opcode_UNICODE
                opcode_SHORT_BINUNICODE opcode_BINUNICODE8 opcode_FLOAT opcode_LIST
                opcode_DICT opcode_ADDITEMS opcode_FROZENSET opcode_POP opcode_DUP
                opcode_POP_MARK opcode_GET opcode_PUT opcode_MEMOIZE opcode_EXT1 opcode_EXT2
                opcode_EXT4 opcode_STACK_GLOBAL opcode_INST opcode_OBJ opcode_NEWOBJ_EX
                opcode_FRAME opcode_PERSID opcode_ff zip
            """,
            r"pickle protocol \d+": """
                protocol_0 protocol_1 protocol_3 protocol_4 protocol_5 protocol_255
            """,
        },
        "LimitExceeded": {
            "take more than 1000 bytes of memory": """
                empty_sets empty_lists marks encoded_often bytearrays sets_of_one_list
                copied_counters
            """,
            r"nested deeper than \d+ levels": """
                deep_list deep_tuple deep_tuple_key deep_tuple_300_key deep_dict deep_calls
            """,
            "hashing the keys takes more than": """
                doubled_key doubled_set doubled_frozenset doubled_codec doubled_complex
                doubled_counter doubled_ordered doubled_late_set doubled_late_frozenset
                doubled_slowly
            """,
            "values, counted wherever they occur": "doubled_lists_late",
            "keys with the same hash": "colliding_integers colliding_tuples colliding_sizes",
            r"Limits\.wide_keys": "wide_keys wide_members",
            "comparing the keys takes more than": """
                equal_parts_in_colliding_keys equal_parts_in_a_set
            """,
            "keys that are not plain values": "complex_keys",
            "items with the same hash": "colliding_set colliding_frozenset",
            r"Limits\.expanded_nbytes": "expanded quantized_huge",
            r"dimensions, but at most \d+ are allowed": "many_dims",
            "bytes when contiguous": "meta",
            r"sparse and nested tensors have \d+ indices and parts, but at most 10 are": """
                coo_often coo_of_none_often csr_often nested_often jagged_often
            """,
        },
        "InvalidObjectError": {
            "reaches byte": "size stride offset other_dtype untyped_v3 quantized_size",
            "a tuple of integers that are not negative": """
                negative_size negative_stride bool_size float_size size_of_str coo_negative
                coo_shape doubled_size
            """,
            "offset of a tensor .* not -1": "negative_offset",
            "bytes from end to end": "huge_stride meta_span",
            "argument 'stride'": "huge_stride_of_one",
            "dimensions and 1 strides": "dims",
            "storage 8 of 7 bytes": "odd_storage storage_of_odd_size",
            "an argument must be": """
                tensor_as_storage requires_grad_int meta_dtype quantized_scale coo_coalesced
                doubled_device doubled_offset doubled_cast sparse_list parameter_of_none
            """,
            "can require gradients": "requires_grad_of_int",
            "conjugate or negative view": "conj_of_float neg_of_int",
            "other than conj and neg": "metadata metadata_list doubled_metadata",
            "of torch.qint8 without a scale": "quantized_without_scale",
            "missing 5 required": "arguments",
            "a quantized tensor of": "quantized_dtype quantized_params",
            "beyond 64 bits": "size_of_70_bits",
            "torch reads device .* as cuda:44": "device_wrapped",
            "zero point": "quantized_zero_point quantized_channels",
            "without its scales": """
                quantized_scheme quantized_short doubled_params doubled_scheme
            """,
            "channel axis": "quantized_axis quantized_axis_negative",
            "QuantizedMeta": "quantized_meta",
            "not of layout": "quantized_sparse",
            "must not be expanded": "quantized_expanded coo_expanded",
            "a part of a tensor must be a torch.Tensor": "quantized_none nested_not_tensors",
            "a sparse tensor has index .*, whose size is": "coo_index coo_size",
            "too many elements": "coo_overflow",
            "same nnz": "coo_values",
            "not sorted and distinct": "coo_uncoalesced",
            "backend of indices": "coo_meta",
            "sparse_dim x nnz": "coo_floats",
            "other parts than its layout needs": """
                coo_parts csr_parts sparse_layout doubled_layout
            """,
            "has plain index 4, but each must be at least 0 and less than 4": """
                csr_index bsr_index
            """,
            "contiguous in each batch": "csr_crow",
            "beyond its buffer": "nested_beyond",
            "parts do not fit together": """
                nested_offset nested_expanded nested_float_sizes nested_meta
            """,
            "of an OrderedDict": "hidden_method hidden_keys hidden_dunder",
            "named by int": "hidden_number",
            "unhashable type": "unhashable_set unhashable_key",
            "latin-1": "encode_wide",
            "a complex number from its two parts": "complex",
            r"torch\.Size\(\)": "size_of_letters",
            "Expected one of cpu": "device",
        },
        "ProtocolError": {
            "ends before its last opcode": "empty",
            "left over after": "trailing two",
            r"tensor row \S+, but the message has": "tensor_row tensor_negative",
            r"storage row \S+, but the message has": """
                storage_row storage_negative doubled_reference
            """,
            r"torch \S+ has no dtype": "storage_dtype",
            "neither to a tensor nor to a storage": "storage_parts empty_reference",
            "the name of a dtype must be a str": "doubled_dtype",
            "was never set": "memo",
            "objects left over": "left_over left_mark",
            "without its operand": """
                nothing no_operands no_function no_class no_memo_target no_list
            """,
            "without its mark": "no_mark",
            "arguments are no tuple": "no_arguments list_arguments",
            "a key without a value": "odd_items",
            "inside the name of a global": "global_cut",
            "not UTF-8": "global_not_utf8",
            "inside an argument": "length_beyond",
        },
    },
    "tree": {
        "ProtocolError": {
            "trailing characters": "trailing",
            "data was truncated": "empty length",
            "a map or an extension": "map map_inside extension timestamp map_depth",
            "unknown tag": "unknown_tag negative_tag",
            "neither a plain value nor a tagged array": "bool_tag str_tag no_tag",
            r"tensor row \S+, but the message has": "row row_negative",
            "other contents than this tag": """
                row_bool row_none rows complex_integers complex_short integer_of_str
                size_of_str dtype_number
            """,
            "a key without a value": "key_without_value",
            "duplicate key": "duplicate_key duplicate_ordered",
            "must be str or int": "bool_key float_key bytes_key node_key",
            "an array for its metadata": """
                ordered_without_metadata ordered_none ordered_two
            """,
            "duplicate item": "duplicate_item equal_items",
            "in its shortest form": "short_integer long_integer empty_integer",
            "beyond 64 bits": "size_beyond",
            r"torch \S+ has no dtype": "dtype dtype_attribute",
            "Invalid UTF-8": "utf8 surrogate",
            "ends inside a value": "bytes_length",
            "not whole, or of no known type": "reserved",
        },
        "InvalidObjectError": {
            "unhashable type": "unhashable",
            "nowhere": "device",
            "Could not parse device index": "device_index",
            "torch reads device .* as cuda:44": "device_wrapped",
            "must not be empty": "device_empty",
            "Invalid device string": "device_null",
        },
        "LimitExceeded": {
            r"Limits\.wide_keys": "wide_keys wide_members wide_members_of_many",
            "more than 4096 dimensions": "size_of_many",
            r"nested deeper than \d+ levels": "depth depth_of_few depth_of_objects",
            "take more than 1000 bytes of memory": "empty_lists empty_sets small_dicts",
            "items with the same hash": "colliding_integers colliding_tuples colliding_complex",
        },
    },
}

# Limits and bounds under which a small input of the same shape is refused, and the cases' names.
LOW: list[tuple[dict[str, int], dict[str, int], str]] = [
    (
        {"depth": 10},
        {},
        """
            pickle-deep_list pickle-deep_tuple pickle-deep_tuple_key pickle-deep_dict
            pickle-deep_calls tree-depth_of_few tree-depth_of_objects tree-map_depth
        """,
    ),
    (
        {"wide_keys": 10},
        {},
        """
            pickle-wide_keys pickle-wide_members tree-wide_keys tree-wide_members
            tree-wide_members_of_many
        """,
    ),
    ({"expanded_nbytes": 64}, {}, "pickle-expanded pickle-quantized_huge"),
    ({"dims": 4}, {}, "pickle-many_dims"),
    (
        {"sparse_nnz": 10},
        {},
        """
            pickle-coo_often pickle-coo_of_none_often pickle-csr_often pickle-nested_often
            pickle-jagged_often
        """,
    ),
    (
        {},
        {"memory_floor": 1000},
        """
            pickle-empty_sets pickle-empty_lists pickle-marks pickle-encoded_often
            pickle-bytearrays pickle-sets_of_one_list pickle-copied_counters tree-empty_lists
            tree-empty_sets tree-small_dicts
        """,
    ),
    (
        {},
        {"hash_steps": 1000},
        """
            pickle-doubled_key pickle-doubled_set pickle-doubled_frozenset pickle-doubled_codec
            pickle-doubled_complex pickle-doubled_counter pickle-doubled_ordered
            pickle-doubled_slowly pickle-doubled_late_set pickle-doubled_late_frozenset
        """,
    ),
    ({}, {"values": 1000}, "pickle-doubled_lists_late"),
    (
        {},
        {"compare_steps": 100},
        "pickle-equal_parts_in_colliding_keys pickle-equal_parts_in_a_set",
    ),
    (
        {},
        {"equal_hashes": 2},
        """
            pickle-colliding_integers pickle-colliding_tuples pickle-colliding_sizes
            pickle-colliding_set pickle-colliding_frozenset tree-colliding_integers
            tree-colliding_tuples tree-colliding_complex
        """,
    ),
    ({}, {"unknown_hashes": 4}, "pickle-complex_keys"),
    ({}, {"global_nbytes": 50}, "pickle-long_name"),
]
