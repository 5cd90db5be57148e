"""What becomes of the keys of Axolotl's that no mapper asks for: not needed, and why, or not supported, and what to do.

Names as in Axolotl 0.18.0; KNOWN has these and those that are mapped, so that what is in neither is a typing mistake.
"""

from __future__ import annotations

from types import MappingProxyType

from ossia.axolotl.draft import Fate

_LOSS = "the loss is computed in chunks, so the logits are never whole in memory"
_ATTENTION = (
    "`attention: auto` takes the fastest backend that knows the sinks; documents in a pack don't see each other"
)
_HARDWARE = "Ossia trains on one device; `weights` and `train.recompute` make room on it (`ossia plan RECIPE` says)"
_MODEL = "the architecture, its tokenizer and Harmony are Ossia's own, for gpt-oss alone"

_NOT_NEEDED = {
    _LOSS: """cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks flash_attn_cross_entropy
        liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling""",
    _ATTENTION: """attn_implementation flash_attention xformers_attention sdp_attention flex_attention sage_attention
        eager_attention flex_attn_compile_kwargs flash_optimum sdpa_varlen fused_attn_kernel flash_attn_d512
        large_head_attention gemma4_hybrid_attn_impl flash_attn_fuse_mlp flash_attn_rms_norm heads_k_stride""",
    "kernels are chosen for the device": """use_kernels experts_implementation lora_mlp_kernel lora_qkv_kernel
        lora_o_kernel lora_embedding_kernel tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp torch_compile
        torch_compile_backend torch_compile_mode torch_compile_options expert_backend moe_grouped_backend
        moe_dequant_chunk_size moe_bnb_fast use_scattermoe use_sonicmoe liger_rope liger_rms_norm liger_rms_norm_gated
        liger_layer_norm liger_swiglu liger_glu_activation""",
    "the released MXFP4 weights are read as they are; `weights: auto` keeps them packed or expands them, as fits": """
        model_quantization_config model_quantization_config_kwargs load_in_4bit load_in_8bit quantize_moe_experts
        bnb_config_kwargs qlora_sharded_model_loading gptq lora_on_cpu""",
    "`weights: auto` decides where weights are": """experimental_skip_move_to_device low_cpu_mem_usage device_map
        max_memory gpu_memory_limit device layer_offloading""",
    "`train.recompute: auto` keeps activations where they fit and computes them again where not; same gradients": """
        gradient_checkpointing gradient_checkpointing_kwargs activation_offloading selective_checkpointing
        unsloth_gradient_checkpointing""",
    "packs are always made, and padding isn't": """pad_to_sequence_len pad_to_multiple_of sample_packing_group_size
        sample_packing_bin_size sample_packing_sequentially sample_packing_mp_start_method sample_packing_eff_est
        multipack_real_batches batch_flattening eval_sample_packing pretrain_multipack_buffer_size
        pretrain_multipack_attn streaming_multipack_buffer_size pretraining_sample_concatenation group_by_length
        accelerator_config""",
    "rows are read from their file while training, and nothing is prepared": """dataset_prepared_path
        skip_prepare_dataset num_dataset_shards_to_save dataset_processes dataset_num_proc dataset_keep_in_memory
        dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor streaming is_preprocess
        preprocess_iterable remove_unused_columns shuffle_before_merging_datasets total_num_tokens
        total_supervised_tokens""",
    _MODEL: """base_model_config cls_model_config tokenizer_config tokenizer_use_fast tokenizer_legacy
        tokenizer_use_mistral_common tokenizer_type tokenizer_save_jinja_files processor_type processor_kwargs
        type_of_model model_type trust_remote_code is_falcon_derived_model is_llama_derived_model
        is_mistral_derived_model is_qwen_derived_model use_onebitllms llama4_linearized_experts""",
    "Harmony's own tokens end a turn, and they are trained with it: <|end|>, <|return|>, and <|call|> after a call": """
        eot_tokens train_on_eos train_on_eot special_tokens""",
    "every step is in the run folder, with tokens per second, memory and gradient norm": """logging_steps
        include_tokens_per_second include_tkps""",
    "evaluations pack like training": "eval_batch_size eval_sequence_len",
    "norms, softmax and the loss are computed in float32, and AdamW updates a float32 copy": """fp32_norms
        fp32_norm_classes embeddings_skip_upcast peft_autocast_adapter_dtype""",
    "`dtype` says what products are computed in": "tf32",
    "a loss or gradient that isn't finite stops the run": "loss_watchdog_threshold loss_watchdog_patience",
    "memory is Ossia's own to keep": "gc_steps gc_collect_steps torch_empty_cache_steps",
    "checkpoints and exports are safetensors": "save_safetensors",
    "`ossia export RUN --to hf-bf16 | hf-mxfp4 | gguf` merges": "merge_lora merge_method quantization",
    "`ossia chat RUN` and `ossia serve RUN` talk to the model": """gradio_title gradio_share gradio_server_name
        gradio_server_port gradio_max_new_tokens gradio_temperature vllm""",
    "`ossia train RECIPE --resume` goes on after any stop; Ctrl-C saves": """auto_resume_from_checkpoints
        dynamic_checkpoint""",
    "it only says how Axolotl itself runs": """strict axolotl_config_path capabilities env_capabilities
        hf_use_auth_token local_rank world_size ddp ddp_timeout ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_find_unused_parameters""",
}

_NOT_SUPPORTED = {
    f"{_HARDWARE}; leave it out": """fsdp fsdp_config fsdp_version fsdp_final_state_dict_type deepspeed deepcompile
        sequence_parallel_degree context_parallel_size ring_attn_func tensor_parallel_size expert_parallel_size use_ray
        ray_run_name ray_num_workers resources_per_worker""",
    "training in 8 bits isn't there; `dtype` is bfloat16, float16 or float32": """fp8 fp8_enable_fsdp_float8_all_gather
        nonexpert_quantization""",
    "AdamW has one learning rate for all; set `train.learning_rate`": """embedding_lr embedding_lr_scale lr_groups
        loraplus_lr_ratio loraplus_lr_embedding optim_target_modules""",
    "AdamW is the only optimizer; its keys are `train.beta1`, `beta2` and `eps`": """optim_args adam_beta3 adam_epsilon2
        dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap
        qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size
        qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size torchdistx_path grokfast_alpha grokfast_lamb""",
    "the learning rate falls as cosine, linear or not at all (`train.schedule`, `train.min_lr_ratio`)": """lr_div_factor
        lr_quadratic_warmup lr_scheduler_kwargs cosine_constant_lr_ratio jagged_restart_steps
        jagged_restart_warmup_steps jagged_restart_anneal_steps""",
    "every layer gets the same kind of adapter; leave it out": """peft peft_use_dora peft_layers_to_transform
        peft_layers_pattern peft_layer_replication peft_init_lora_weights peft_trainable_token_indices
        peft_ensure_weight_tying lora_fan_in_fan_out loftq_config relora relora_prune_ratio relora_prune_method
        relora_cpu_offload""",
    "modules are trained whole or by an adapter, not mixed; `adapter.targets` can name lm_head": "lora_modules_to_save",
    "all weights are trained, or an adapter's": "unfrozen_parameters lisa_n_layers lisa_step_interval"
    " lisa_layers_attribute spectrum_top_fraction spectrum_model_name freeze_mm_modules",
    "the tokenizer stays the checkpoint's own, with every token that it has": """tokens added_tokens_overrides
        resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings fix_untrained_tokens""",
    "the model stays as released; leave it out": """overrides_of_model_config overrides_of_model_kwargs
        model_config model_kwargs rope_scaling reinit_weights scaling_softmax scaling_softmax_factor
        scaling_softmax_bias use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks""",
    "the newest revision is read; download another one and name its folder in `model`": "revision_of_model"
    " model_revision",
    "noise on embeddings isn't there; leave it out": "neftune_noise_alpha noisy_embedding_alpha",
    "prepare the rows: take out duplicates and short ones before training": """dataset_exact_deduplication
        min_sample_len max_prompt_len""",
    "prepare the rows: leave out those that aren't meant to be read": "dataset_shard_num dataset_shard_idx",
    "rows are always shuffled, by `train.seed`": "curriculum_sampling shuffle_merged_datasets",
    "a batch is tokens: `train.tokens_per_step`; `ossia plan` says what fits": "auto_find_batch_size",
    "the last step's samples may be fewer; leave it out": "dataloader_drop_last",
    "a run ends at its last step; pick one of its checkpoints by its held-out loss": """early_stopping_patience
        load_best_model_at_end metric_for_best_model greater_is_better""",
    "a checkpoint always holds what a run goes on from; `train.save_every` says how often": "save_only_model"
    " save_first_step",
    "`ossia generate` and the report's answers show what the model says": """generate_samples num_generation_samples
        generation_max_new_tokens generation_temperature generation_top_p generation_top_k generation_prompt_ratio
        generation_do_sample eval_table_size eval_max_new_tokens do_causal_lm_eval eval_causal_lm_metrics do_bench_eval
        bench_dataset bench_split""",
    "use `ossia export --to hf-bf16` and lm-eval on its folder": """lm_eval_tasks lm_eval_batch_size
        lm_eval_post_train lm_eval_model""",
    "events go to `events.jsonl` in the run folder, and to `log.sinks`: tensorboard, wandb, trackio": """use_mlflow
        mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts use_comet comet_api_key
        comet_workspace comet_project_name comet_experiment_key comet_mode comet_online comet_experiment_config
        use_otel_metrics otel_metrics_host otel_metrics_port use_swanlab swanlab_project swanlab_experiment_name
        swanlab_mode swanlab_workspace profiler_steps profiler_steps_start""",
    "push after training: `ossia push RUN OWNER/NAME`, or `ossia export ... --push OWNER/NAME`": """hub_model_id
        hub_strategy hub_revision push_dataset_to_hub""",
    "name the run with --resume, or start from its adapter: `adapter.init_from`": "resume_from_checkpoint",
    "the loss of supervised training is plain cross entropy; leave it out": """use_eaft eaft_alpha eaft_k trainer_cls
        center_rewards_coefficient num_labels kd_trainer kd_ce_alpha kd_alpha kd_temperature kd_beta""",
    "preference losses aren't there yet; leave it out": """dpo_use_weighting dpo_label_smoothing
        precompute_ref_log_probs
        dpo_use_liger_kernel dpo_padding_free dpo_loss_type dpo_loss_weights dpo_beta dpo_use_logits_to_keep
        dpo_generate_during_eval dpo_norm_loss rpo_alpha orpo_alpha simpo_gamma cpo_alpha kto_desirable_weight
        kto_undesirable_weight rl_beta ebft""",
    "gpt-oss reads text alone; leave it out": "image_size image_resize_algorithm role_boundaries",
    "Axolotl has renamed or removed it itself; leave it out": "max_packed_sequence_len s2_attention",
}

# Keys that the mappers read.
_MAPPED = """base_model adapter lora_model_dir lora_r lora_alpha lora_dropout lora_target_linear lora_target_modules
    lora_target_parameters lora_rank_pattern lora_alpha_pattern peft_use_rslora datasets test_datasets
    pretraining_dataset sequence_len excess_length_strategy sample_packing chat_template chat_template_jinja
    chat_template_kwargs default_system_message train_on_inputs micro_batch_size gradient_accumulation_steps batch_size
    num_epochs max_steps optimizer learning_rate lr_scheduler cosine_min_lr_ratio warmup_steps warmup_ratio weight_decay
    adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed bf16 bfloat16 fp16 float16 float32 val_set_size eval_steps
    evals_per_epoch eval_strategy evaluation_strategy save_steps saves_per_epoch save_strategy save_total_limit
    output_dir plugins rl trl qat reward_model process_reward_model dp_shard_size dp_replicate_size use_tensorboard
    use_wandb wandb_project wandb_entity wandb_watch wandb_name wandb_log_model wandb_run_id wandb_mode use_trackio
    trackio_project_name trackio_run_name trackio_space_id"""

REASONS = MappingProxyType(
    {
        name: (fate, reason)
        for fate, table in ((Fate.not_needed, _NOT_NEEDED), (Fate.not_supported, _NOT_SUPPORTED))
        for reason, names in table.items()
        for name in names.split()
    }
)
MAPPED = frozenset(_MAPPED.split())
KNOWN = MAPPED | frozenset(REASONS)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SHARDING = ("fsdp", "fsdp_config", "deepspeed")

DATASET_KEYS = _names(
    """path split type input_transform shards shards_idx preprocess_shards conversation chat_template
    chat_template_jinja data_files input_format name ds_type field field_human field_model field_messages field_tools
    field_thinking template_thinking_key message_field_role message_field_content message_property_mappings
    message_field_training message_field_training_detail split_thinking logprobs_field temperature roles_to_train
    train_on_eos train_on_eot roles drop_system_message trust_remote_code revision text_column skip field_system
    field_instruction field_input field_output format no_input_format system_prompt system_format field_chosen
    field_rejected"""
)
TRL_KEYS = _names(
    """beta max_completion_length use_vllm vllm_mode vllm_server_host vllm_server_port vllm_server_timeout
    vllm_guided_decoding_regex reward_funcs reward_weights generation_batch_size num_generations log_completions
    num_completions_to_print importance_sampling_level sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
    scale_rewards temperature top_p top_k min_p repetition_penalty generation_kwargs chat_template_kwargs
    num_iterations epsilon epsilon_high use_liger_loss loss_type mask_truncated_completions vllm_enable_sleep_mode
    rollout_func multi_objective_aggregation use_data_producer async_prefetch prefetch_depth vllm_sync_interval
    streaming_partial_batch streaming_min_groups vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_importance_sampling_cap off_policy_mask_threshold use_bias_correction_kl reward_num_workers replay_buffer_size
    replay_recompute_logps reroll_start_fraction reroll_max_groups skip_zero_advantage_batches vllm_lora_sync"""
)
INSIDE = MappingProxyType(
    {"datasets": DATASET_KEYS, "test_datasets": DATASET_KEYS, "pretraining_dataset": DATASET_KEYS, "trl": TRL_KEYS}
)
