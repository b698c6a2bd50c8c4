"""Names of other libraries that the package calls, with their parameters and the files that call them."""


def files(room, names):
    return [f"trl_vpo/{room}/{name}.py" for name in names.split()]


BASE, SETUP, COMPAT, CONFIG, CARD, METRICS = files("trainers", "base setup compat config card metrics")
LOGS, RATES, REFERENCE, PRECOMPUTE = files("trainers", "logs rates reference precompute")
FINGERPRINT, GROUPS = files("trainers", "fingerprint row_groups")
SCORING, HEAD, KL, ATTENTION = files("forward", "scoring head kl attention")
LAYOUTS, FAMILIES, RANKS, VISION = files("forward", "layouts families ranks vision")
TOWER, SEQUENCES, PROOF = files("forward", "tower sequence_parallel proof")
RESUME, SIGTERM, CHANGED_ROWS, LAUNCH = files("training", "resume sigterm changed_rows launch")
RUN, PROGRESS, HUB_REPO, CALLBACK_OF_RESUME = files("training", "run progress hub_repo resume_callback")
ADAPTERS, ATTACH, MERGE, SOURCE = files("models", "adapters attach merge source")
CHECKS, ACTIVATIONS = files("doctor", "checks activation_estimate")
CANDIDATES, CALLBACK = files("evaluate", "candidates callback")
(RECIPE,) = files("runs", "recipe")
(DECODE,) = files("media", "decode")

# Where it is, what we call it with (parameters in their order; `|`: names of one), who uses it. `...`: an attribute.
CALLED = [
    ("trl.DPOTrainer.compute_ref_log_probs", "self model inputs", BASE),
    ("trl.trainer.dpo_trainer.create_model_from_path", "model_id", COMPAT),
    ("trl.trainer.utils.use_adapter", "model adapter_name", REFERENCE),
    ("trl.trainer.utils.get_config_model_id", "config", f"{BASE}, {SETUP} and {CARD}"),
    ("trl.DPOTrainer._prepare_dataset", "self dataset processing_class args dataset_name", BASE),
    ("trl.DPOTrainer._precompute_ref_logps", "self dataset name batch_size", BASE),
    ("trl.DPOTrainer._set_signature_columns_if_needed", "self", BASE),
    ("trl.DPOTrainer.compute_loss", "self model inputs return_outputs num_items_in_batch", BASE),
    ("trl.DPOTrainer.prediction_step", "self model inputs prediction_loss_only ignore_keys", BASE),
    ("transformers.Trainer.get_batch_samples", "self epoch_iterator num_batches device", LOGS),
    ("transformers.Trainer.training_step", "self model inputs num_items_in_batch", LOGS),
    ("transformers.Trainer._maybe_log_save_evaluate", "self tr_loss", LOGS),
    ("transformers.Trainer._finalize_training", "self trial num_train_samples start_time", f"{LOGS} and {RESUME}"),
    ("transformers.Trainer._load_from_checkpoint", "self resume_from_checkpoint model", BASE),
    ("transformers.Trainer._load_best_model", "self", BASE),
    ("transformers.Trainer.create_optimizer", "self model", RATES),
    (
        "transformers.PreTrainedModel.activation_checkpointing_enable",
        "self activation_checkpointing_kwargs every_n_layers offload",
        COMPAT,
    ),
    ("transformers.modeling_layers.GradientCheckpointingLayer.gradient_checkpointing", ..., PROOF),
    ("accelerate.Accelerator.reduce", "self tensor reduction", LOGS),
    ("accelerate.Accelerator.gather", "self tensor", GROUPS),
    ("accelerate.utils.recursively_apply", "func data", GROUPS),
    ("transformers.Trainer.create_accelerator_and_postprocess", "self", GROUPS),
    ("transformers.Trainer._get_dataloader", "self dataset description batch_size", GROUPS),
    ("transformers.Trainer.get_total_train_batch_size", "self args", GROUPS),
    (
        "transformers.Qwen3VLTextModel.forward",
        "self input_ids attention_mask position_ids past_key_values|cache inputs_embeds use_cache visual_pos_masks "
        "deepstack_visual_embeds",
        SEQUENCES,
    ),
    (
        "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers",
        "peft_config model conversions",
        ADAPTERS,
    ),
    (
        "peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers",
        "model peft_config adapter_state_dict adapter_name",
        ADAPTERS,
    ),
    ("torch.distributed.elastic.multiprocessing.errors.record", "fn error_handler", COMPAT),
    ("torch.distributed.elastic.multiprocessing.errors.ErrorHandler.record_exception", "self e", COMPAT),
    ("trl.DPOTrainer.create_model_card", "self model_name dataset_name tags", BASE),
    ("trl.DPOTrainer.floating_point_ops", "self inputs", LOGS),
    ("trl.DPOTrainer.save_model", "self output_dir _internal_call", BASE),
    (
        "trl.DPOTrainer.evaluation_loop",
        "self dataloader description prediction_loss_only ignore_keys metric_key_prefix",
        LOGS,
    ),
    ("trl.extract_prompt", "example", "trl_vpo/data/rows.py"),
    ("trl.get_dataset", "mixture_config", "trl_vpo/data/sources.py"),
    ("trl.get_peft_config", "model_args", f"{RUN} and {CHECKS}"),
    ("trl.get_quantization_config", "model_args", RUN),
    ("trl.scripts.utils.TrlParser.parse_args_and_config", "self args", RECIPE),
    ("accelerate.utils.gather_object", "object", f"{LOGS}, {METRICS}, {PRECOMPUTE} and {RANKS}"),
    ("accelerate.utils.broadcast_object_list", "object_list", FINGERPRINT),
    ("accelerate.utils.is_peft_model", "model", f"{BASE} and {CARD}"),
    ("accelerate.Accelerator.gather_for_metrics", "self input_data use_gather_object", METRICS),
    (
        "peft.get_peft_model_state_dict",
        "model state_dict adapter_name unwrap_compiled save_embedding_layers",
        f"{CHECKS} and {MERGE}",
    ),
    ("huggingface_hub.constants.HF_HUB_OFFLINE", ..., SOURCE),
    ("datasets.config.HF_HUB_OFFLINE", ..., SOURCE),
    ("peft.load_peft_weights", "model_id device", ATTACH),
    ("peft.utils.TrainableTokensWrapper.adapter_state_dict", "self adapter_name state_dict", ATTACH),
    ("peft.utils.TrainableTokensWrapper.adapter_state_dict_load_map", "self adapter_name", ATTACH),
    ("peft.PeftModel.load_adapter", "self model_id adapter_name is_trainable torch_device", ATTACH),
    (
        "transformers.conversion_mapping.get_model_conversion_mapping",
        "model key_mapping hf_quantizer add_legacy",
        ATTACH,
    ),
    ("transformers.core_model_loading.apply_renamings", "source_key weight_renamings", ATTACH),
    ("transformers.TrainingArguments.to_dict", "self", CONFIG),
    ("torch.distributed.launcher.api.LaunchConfig.signals_to_handle", ..., LAUNCH),
    ("accelerate.commands.launch.launch_command", "args", LAUNCH),
    ("accelerate.commands.launch.launch_command_parser", "subparsers", LAUNCH),
    ("peft.PeftModel.delete_adapter", "self adapter_name", BASE),
    ("peft.PeftModel.get_base_model", "self", BASE),
    ("transformers.AttentionInterface.register", "key value", ACTIVATIONS),
    ("transformers.AttentionMaskInterface.register", "key value", ACTIVATIONS),
    ("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get", "key default", ATTENTION),
    ("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface", "attn_implementation default", ATTENTION),
    ("torch.nn.attention.varlen.varlen_attn", "query key value cu_seq_q cu_seq_k max_q max_k", ATTENTION),
    ("transformers.integrations.flash_attention.get_target_dtype", "query module", ATTENTION),
    (
        "transformers.utils.generic.is_flash_attention_requested",
        "config requested_attention_implementation",
        ATTENTION,
    ),
    ("transformers.PreTrainedModel._supports_attention_backend", ..., FAMILIES),
    ("transformers.Qwen2VLModel.get_rope_index", "self input_ids", LAYOUTS),
    ("transformers.Qwen2VLModel.get_image_features", "self pixel_values", FAMILIES),
    ("transformers.Qwen2VLModel.get_video_features", "self pixel_values_videos", FAMILIES),
    ("transformers.LlavaModel.get_image_features", "self pixel_values", FAMILIES),
    ("transformers.PreTrainedModel.get_decoder", "self", VISION),
    ("transformers.PreTrainedModel.get_output_embeddings", "self", HEAD),
    ("transformers.PretrainedConfig.get_text_config", "self", HEAD),
    ("transformers.PreTrainedModel.base_model", ..., HEAD),
    ("transformers.Trainer.loss_is_scaled_for_ga", ..., BASE),
    ("torch.distributed.tensor.DTensor.full_tensor", "self", HEAD),
    ("transformers.Trainer._prepare_inputs", "self inputs", CALLBACK),
    ("transformers.Trainer._prepare_input", "self data", LOGS),
    ("transformers.Trainer._save_checkpoint", "self model trial", RESUME),
    (
        "transformers.Trainer._init_training_state",
        "self max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
        RESUME,
    ),
    ("transformers.Trainer.compute_loss_context_manager", "self", BASE),
    ("transformers.Trainer.pop_callback", "self callback", PROGRESS),
    ("torch.nn.modules.dropout._DropoutNd", ..., COMPAT),
    ("av.sidedata.sidedata.Type", ..., DECODE),
    ("transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", ..., HEAD),
    ("huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY", ..., HUB_REPO),
    ("huggingface_hub.set_client_factory", "client_factory", HUB_REPO),
    ("huggingface_hub.HfApi.auth_check", "self repo_id", HUB_REPO),
    ("peft.PeftModel.set_adapter", "self adapter_name inference_mode", CANDIDATES),
    ("torch.utils.data.DataLoader._get_iterator", "self", SIGTERM),
    ("multiprocessing.popen_fork.Popen._send_signal", "self sig", SIGTERM),
    ("transformers.Trainer._get_train_sampler", "self train_dataset", f"{CHANGED_ROWS} and {RESUME}"),
]

# Where it is, lines that its source has, who leans on them.
SOURCES = [
    ("trl.DPOTrainer.__init__", ['model.add_adapter("ref"', 'model.peft_config["default"]'], f"{BASE}, {COMPAT}"),
    (
        "trl.DPOTrainer.evaluate",
        [
            "self._is_vision_dataset",
            "self._prepare_dataset(",
            "self.precompute_ref_logps",
            "self.state.global_step > 0",
            "self._precompute_ref_logps(",
        ],
        f"`_finish_init` in {BASE}",
    ),
    (
        "transformers.Trainer._prepare_input",
        ["hf_ds_config.dtype()", "self._prepare_input(v) for k, v in data.items()"],
        f"`_prepare_input` in {LOGS}",
    ),
    ("trl.DPOTrainer.training_step", ["with self.maybe_activation_offload_context:"], LOGS),
    ("trl.DPOTrainer.log", ["self._metrics[mode]", "logs.update(metrics)"], f"`_average_training` in {LOGS}"),
    (
        "transformers.Trainer._run_epoch",
        [
            "num_items_in_batch = self.get_batch_samples(epoch_iterator, num_batches, self.args.device)",
            "self.current_gradient_accumulation_steps = len(batch_samples)",
        ],
        f"`get_batch_samples` in {LOGS}",
    ),
    (
        "transformers.Trainer.training_step",
        ["loss = loss / self.current_gradient_accumulation_steps"],
        f"`compute_loss` in {BASE}",
    ),
    ("transformers.TrainingArguments.__str__", ["asdict(self)", 'k.endswith("_token")'], CONFIG),
    ("peft.PeftModel.load_adapter", ["load_result.missing_keys", "return load_result"], ATTACH),
    (
        "bitsandbytes.nn.Linear4bit.forward",
        ["self.support_avx512bf16_for_cpu", "packing_format_for_cpu"],
        f"`keep_4bit_weights_trainable` in {COMPAT}",
    ),
    ("torch.utils.data.DataLoader.__iter__", ["self._get_iterator()"], f"`shield_data_workers` in {SIGTERM}"),
    (
        "torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__",
        ["self._workers.append(w)"],
        f"`shield_data_workers` in {SIGTERM}",
    ),
    ("multiprocessing.util._exit_function", ["p._popen.terminate()"], f"`shield_data_workers` in {SIGTERM}"),
    (
        "torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data",
        ['f"DataLoader worker (pid(s) {pids_str}) exited unexpectedly"'],
        f"`train` in {RESUME}",
    ),
    ("transformers.ProgressCallback.__init__", ["self.training_bar = None", "self.prediction_bar = None"], PROGRESS),
    ("transformers.ProgressCallback.on_step_end", ["state.global_step - self.current_step"], PROGRESS),
    ("argparse._ActionsContainer.__init__", ["self._option_string_actions = {}"], RECIPE),
    ("accelerate.data_loader.prepare_data_loader", ["and new_dataset.n_shards >"], GROUPS),
    (
        "accelerate.data_loader.prepare_data_loader",
        ["if isinstance(sampler, RandomSampler) and use_seedable_sampler:"],
        CHANGED_ROWS,
    ),
    (
        "accelerate.data_loader.prepare_data_loader",
        [
            'submesh_tp_size = torch_device_mesh["tp"].size()',
            'submesh_dp_size = torch_device_mesh["dp_replicate"].size()',
            "process_index = process_index // (submesh_tp_size * submesh_cp_size)",
            "num_processes = num_processes // submesh_tp_size",
        ],
        f"`share_rows` in {GROUPS}",
    ),
    ("accelerate.Accelerator._prepare_device_mesh", ["return self.torch_device_mesh"], f"`share_rows` in {GROUPS}"),
    ("accelerate.Accelerator.torch_device_mesh.fget", ["self.state.device_mesh"], f"`share_rows` in {GROUPS}"),
    ("accelerate.Accelerator.gather_for_metrics", ["data = self.gather(input_data)"], f"`_gather` in {GROUPS}"),
    (
        "accelerate.Accelerator.__init__",
        ['elif os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":'],
        f"`sp_size` in {GROUPS}",
    ),
    (
        "accelerate.utils.launch.prepare_extend_env_parallelism_config",
        ['current_env["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"', 'current_env[prefix + "SP_SIZE"] = str('],
        f"`sp_size` in {GROUPS}",
    ),
    (
        "transformers.Trainer._build_accelerator_args",
        ["if self.args.parallelism_config is not None:"],
        f"`create_accelerator_and_postprocess` in {GROUPS}",
    ),
    (
        "transformers.Trainer._inner_training_loop",
        [
            "epochs_trained, steps_trained_in_current_epoch = self._init_training_state(",
            "if args.eval_on_start:\n            self._evaluate(",
        ],
        f"`place` and `on_train_begin` in {CALLBACK_OF_RESUME}",
    ),
    (
        "transformers.Trainer._init_training_state",
        ['f"The best checkpoint {', "self.state.best_model_checkpoint = None"],
        f"`place` in {CALLBACK_OF_RESUME}",
    ),
    (
        "transformers.Trainer.set_initial_training_values",
        ["num_update_steps_per_epoch = max_steps"],
        f"`place` in {CALLBACK_OF_RESUME}, which can go where a stream's passes are counted",
    ),
    ("transformers.Trainer.get_train_dataloader", ["sampler_fn=self._get_train_sampler"], CHANGED_ROWS),
    ("accelerate.commands.launch.simple_launcher", ["subprocess.CalledProcessError("], LAUNCH),
    ("torch.nn.parallel.DistributedDataParallel.__init__", ["_ddp_params_and_buffers_to_ignore"], RUN),
    (
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention.forward",
        ["torch.split(tensor, lengths.tolist(), dim=2)", "for q, k, v in zip(*splits)"],
        TOWER,
    ),
    ("torch.nn.Module._wrapped_call_impl", ["return self._call_impl(*args, **kwargs)"], VISION),
]
