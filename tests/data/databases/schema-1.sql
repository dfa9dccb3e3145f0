BEGIN TRANSACTION;
CREATE TABLE events (
    task_key INTEGER NOT NULL REFERENCES tasks (key) ON DELETE CASCADE,
    seq INTEGER NOT NULL,
    run INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (task_key, seq)
) WITHOUT ROWID;
INSERT INTO "events" VALUES(1,1,1,X'0801120B08CC8CA9D80610D0CD8F021801220408011002');
INSERT INTO "events" VALUES(1,2,1,X'0802120B08CC8CA9D8061088E1960E1801220408021003');
INSERT INTO "events" VALUES(1,3,1,X'0803120B08CC8CA9D8061088E1960E18012A020801');
INSERT INTO "events" VALUES(1,4,1,X'0804120C08CC8CA9D80610E8EFA19B0218012A020802');
INSERT INTO "events" VALUES(1,5,1,X'0805120C08CC8CA9D80610F8BAA39B0218012A020803');
INSERT INTO "events" VALUES(1,6,1,X'0806120C08CC8CA9D80610E8E6A49B0218012A020804');
INSERT INTO "events" VALUES(1,7,1,X'0807120C08CC8CA9D80610E8E0A69B0218013A1C080111000000000000D03F1A0F0A046C6F737311000000000000F03F');
INSERT INTO "events" VALUES(1,8,1,X'0808120C08CC8CA9D80610B0C6A79B02180132160801100419000000000000D03F39000000000000F03F');
INSERT INTO "events" VALUES(1,9,1,X'0809120C08CC8CA9D80610B0C0A99B0218013A1C080211000000000000E03F1A0F0A046C6F737311000000000000E03F');
INSERT INTO "events" VALUES(1,10,1,X'080A120C08CC8CA9D80610909EAA9B02180132160802100419000000000000E03F39000000000000E03F');
INSERT INTO "events" VALUES(1,11,1,X'080B120C08CC8CA9D80610A0BCBA9B0218014A370A2C2F646174612F66696E6574756E65642F7363656E652F6F75742F72756E2D312F636865636B706F696E742D32100222057374657073');
INSERT INTO "events" VALUES(1,12,1,X'080C120C08CC8CA9D806108091BE9B0218013A1C080311000000000000E83F1A0F0A046C6F737311555555555555D53F');
INSERT INTO "events" VALUES(1,13,1,X'080D120C08CC8CA9D80610F8E6BE9B02180132160803100419000000000000E83F39555555555555D53F');
INSERT INTO "events" VALUES(1,14,1,X'080E120C08CC8CA9D80610A0AAC09B0218013A1C080411000000000000F03F1A0F0A046C6F737311000000000000D03F');
INSERT INTO "events" VALUES(1,15,1,X'080F120C08CC8CA9D80610E0E8C09B02180132160804100419000000000000F03F39000000000000D03F');
INSERT INTO "events" VALUES(1,16,1,X'0810120C08CC8CA9D80610A086CC9B0218014A370A2C2F646174612F66696E6574756E65642F7363656E652F6F75742F72756E2D312F636865636B706F696E742D34100422057374657073');
INSERT INTO "events" VALUES(1,17,1,X'0811120C08CC8CA9D8061080C6D69B0218014A350A2C2F646174612F66696E6574756E65642F7363656E652F6F75742F72756E2D312F636865636B706F696E742D3410042203656E64');
INSERT INTO "events" VALUES(1,18,1,X'0812120C08CC8CA9D80610F898D89B021801421C0A04696E666F120466616B651A0E656E64733A2046494E4953484544');
INSERT INTO "events" VALUES(1,19,1,X'0813120C08CC8CA9D80610A8D2E2D50218016A4A08011214416C6C2065706F6368732061726520646F6E652E1804222C2F646174612F66696E6574756E65642F7363656E652F6F75742F72756E2D312F636865636B706F696E742D342800');
INSERT INTO "events" VALUES(1,20,1,X'0814120C08CC8CA9D80610A8D2E2D5021801221C0803100418012214416C6C2065706F6368732061726520646F6E652E');
INSERT INTO "events" VALUES(2,1,1,X'0801120C08CC8CA9D80610F8B2A4E1021801220408011002');
INSERT INTO "events" VALUES(2,2,1,X'0802120C08CC8CA9D80610B89CEAE1021801220408021003');
INSERT INTO "events" VALUES(2,3,1,X'0803120C08CC8CA9D80610B89CEAE10218012A020801');
INSERT INTO "events" VALUES(2,4,1,X'0804120B08CD8CA9D80610A0AB9D7218012A020802');
INSERT INTO "events" VALUES(2,5,1,X'0805120B08CD8CA9D8061098FE9E7218012A020803');
INSERT INTO "events" VALUES(2,6,1,X'0806120B08CD8CA9D8061088AAA07218012A020804');
INSERT INTO "events" VALUES(2,7,1,X'0807120B08CD8CA9D8061088A4A27218013A1C080111555555555555D53F1A0F0A046C6F737311000000000000F03F');
INSERT INTO "events" VALUES(2,8,1,X'0808120B08CD8CA9D80610D089A372180132160801100319555555555555D53F39000000000000F03F');
INSERT INTO "events" VALUES(2,9,1,X'0809120B08CD8CA9D80610D083A57218013A1C080211555555555555E53F1A0F0A046C6F737311000000000000E03F');
INSERT INTO "events" VALUES(2,10,1,X'080A120B08CD8CA9D80610C8D9A572180132160802100319555555555555E53F39000000000000E03F');
INSERT INTO "events" VALUES(2,11,1,X'080B120B08CD8CA9D80610B0E2E37918016A6A080D12625468652072756E6E657220656E6465642077697468206578697420737461747573203120616E64206C656674206E6F20726573756C743B2073656520697473206C6F672E204E6F20636865636B706F696E7420686164206265656E2073617665642E18022801');
INSERT INTO "events" VALUES(2,12,1,X'080C120B08CD8CA9D80610B0E2E3791801226A08031006180D22625468652072756E6E657220656E6465642077697468206578697420737461747573203120616E64206C656674206E6F20726573756C743B2073656520697473206C6F672E204E6F20636865636B706F696E7420686164206265656E2073617665642E');
INSERT INTO "events" VALUES(3,1,1,X'0801120C08CD8CA9D80610F8A6DA80011801220408011002');
INSERT INTO "events" VALUES(3,2,1,X'0802120C08CD8CA9D80610809D9481011801220408021003');
INSERT INTO "events" VALUES(3,3,1,X'0803120C08CD8CA9D80610809D94810118012A020801');
INSERT INTO "events" VALUES(3,4,1,X'0804120C08CD8CA9D80610F0A1E0960118012A380808122B612073746F70207761732061736B656420666F723B206120636865636B706F696E74206973207361766564190000000000C08240');
INSERT INTO "events" VALUES(3,5,1,X'0805120C08CD8CA9D80610C8DDC9A50318012A020808');
INSERT INTO "events" VALUES(3,6,1,X'0806120C08CD8CA9D80610C8D4CCA503180142230A04696E666F120466616B651A15656E64733A2053544F505045445F42595F55534552');
INSERT INTO "events" VALUES(3,7,1,X'0807120B08CE8CA9D80610E0D6F31218016A190804121353746F70706564206F6E20726571756573742E2800');
INSERT INTO "events" VALUES(3,8,1,X'0808120B08CE8CA9D80610E0D6F3121801221B080310051804221353746F70706564206F6E20726571756573742E');
INSERT INTO "events" VALUES(3,9,2,X'0809120B08CE8CA9D80610E0BBED171802220408051002');
INSERT INTO "events" VALUES(3,10,2,X'080A120B08CE8CA9D806108892B61A1802220408021003');
INSERT INTO "events" VALUES(3,11,2,X'080B120B08CE8CA9D806108892B61A18022A020801');
INSERT INTO "events" VALUES(3,12,2,X'080C120C08CE8CA9D80610C89DE0DF0218022A020802');
INSERT INTO "events" VALUES(3,13,2,X'080D120C08CE8CA9D80610F0E0E1DF0218022A020803');
INSERT INTO "events" VALUES(3,14,2,X'080E120C08CE8CA9D8061090FDE2DF0218022A020804');
INSERT INTO "events" VALUES(3,15,2,X'080F120C08CE8CA9D80610C0E7E4DF0218023A1C080111555555555555D53F1A0F0A046C6F737311000000000000F03F');
INSERT INTO "events" VALUES(3,16,2,X'0810120C08CE8CA9D80610A0C5E5DF02180232160801100319555555555555D53F39000000000000F03F');
INSERT INTO "events" VALUES(3,17,2,X'0811120C08CE8CA9D80610B8B7E7DF0218023A1C080211555555555555E53F1A0F0A046C6F737311000000000000E03F');
INSERT INTO "events" VALUES(3,18,2,X'0812120C08CE8CA9D80610C885E8DF02180232160802100319555555555555E53F39000000000000E03F');
INSERT INTO "events" VALUES(3,19,2,X'0813120C08CE8CA9D8061088C1E9DF0218023A1C080311000000000000F03F1A0F0A046C6F737311555555555555D53F');
INSERT INTO "events" VALUES(3,20,2,X'0814120C08CE8CA9D80610C8FFE9DF02180232160803100319000000000000F03F39555555555555D53F');
INSERT INTO "events" VALUES(3,21,2,X'0815120C08CE8CA9D80610D897FCDF0218024A350A2C2F646174612F66696E6574756E65642F7363656E652F6F75742F72756E2D332F636865636B706F696E742D3310032203656E64');
INSERT INTO "events" VALUES(3,22,2,X'0816120C08CE8CA9D80610A0FAFDDF021802421C0A04696E666F120466616B651A0E656E64733A2046494E4953484544');
INSERT INTO "events" VALUES(3,23,2,X'0817120C08CE8CA9D80610E8AC91890318026A4A08011214416C6C2065706F6368732061726520646F6E652E1803222C2F646174612F66696E6574756E65642F7363656E652F6F75742F72756E2D332F636865636B706F696E742D332800');
INSERT INTO "events" VALUES(3,24,2,X'0818120C08CE8CA9D80610E8AC9189031802221C0803100418012214416C6C2065706F6368732061726520646F6E652E');
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
INSERT INTO "meta" VALUES('log_epoch','4af817a45b8f9c81');
CREATE TABLE requests (
    request_id TEXT PRIMARY KEY,
    digest BLOB NOT NULL,
    answer BLOB NOT NULL,
    time INTEGER NOT NULL
) WITHOUT ROWID;
INSERT INTO "requests" VALUES('first-request-0001',X'3C868E48D3ABD17981F10FD07E087474282A5D8F2C92EC3137A5CE7CCE165E56',X'0ABB030A147461736B732F7366742D3133306632643164313712137366745F32303236313132385F303331313039180122D7020A6E0A212F646174612F66696E6574756E65642F7363656E652F63686174732E6A736F6E6C1A192F646174612F66696E6574756E65642F7363656E652F6F7574221B2F646174612F66696E6574756E65642F7363656E652F6D6F64656C38004000490000000000000000500058016000127508021004188004212D431CEBE2362A3F2A0B6164616D775F746F7263683206636F73696E653802417B14AE47E17A843F499A9999999999B93F500059000000000000F03F60FFFFFFFFFFFFFFFFFF0168027205737465707378648201026E6F88016490016498011EA00100A9017B14AE47E17A743F1A520801101018102100000000000000002A3F0A06715F70726F6A0A066B5F70726F6A0A06765F70726F6A0A066F5F70726F6A0A09676174655F70726F6A0A0775705F70726F6A0A09646F776E5F70726F6A3000220C0800100018012000280030012A080A04696E666F100A3202082A2A03637075300250025A006A0C08CD8CA9D80610D0ECD58001720B08CE8CA9D80610E0BBED178801099001019A010522332D3722',1795835470050263);
INSERT INTO "requests" VALUES('second-request-0001',X'D4EEE6C8818056314032462D2FAD74E0A3C64A36D852D268EA62F5A70BE15907',X'0AB4030A147461736B732F7366742D3135393532633366326412137366745F32303236313132385F303331313130180122D7020A6E0A212F646174612F66696E6574756E65642F7363656E652F63686174732E6A736F6E6C1A192F646174612F66696E6574756E65642F7363656E652F6F7574221B2F646174612F66696E6574756E65642F7363656E652F6D6F64656C38004000490000000000000000500058016000127508021004188004212D431CEBE2362A3F2A0B6164616D775F746F7263683206636F73696E653802417B14AE47E17A843F499A9999999999B93F500059000000000000F03F60FFFFFFFFFFFFFFFFFF0168027205737465707378648201026E6F88016490016498011EA00100A9017B14AE47E17A743F1A520801101018102100000000000000002A3F0A06715F70726F6A0A066B5F70726F6A0A06765F70726F6A0A066F5F70726F6A0A09676174655F70726F6A0A0775705F70726F6A0A09646F776E5F70726F6A3000220C0800100018012000280030012A080A04696E666F100A3202082A2A0363707530015A006A0C08CE8CA9D8061080D4969003720C08CE8CA9D8061080D49690039A010522342D3122',1795835470839360);
CREATE TABLE runs (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    task_key INTEGER NOT NULL REFERENCES tasks (key) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    state TEXT NOT NULL,
    device TEXT NOT NULL,
    parameters TEXT NOT NULL,
    end_reason TEXT,
    end_message TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    end_time INTEGER NOT NULL,
    identity TEXT,
    exit_code INTEGER,
    signal TEXT NOT NULL,
    progress TEXT NOT NULL,
    last_checkpoint TEXT NOT NULL,
    run_dir TEXT NOT NULL,
    output_dir TEXT NOT NULL,
    stop TEXT,
    stop_time INTEGER NOT NULL,
    ingested_bytes INTEGER NOT NULL,
    ingested_seq INTEGER NOT NULL,
    UNIQUE (task_key, number)
);
INSERT INTO "runs" VALUES(1,1,1,'COMPLETED','cpu','{"data":{"train_file":"/data/finetuned/scene/chats.jsonl","eval_file":null,"output_dir":"/data/finetuned/scene/out","model_path":"/data/finetuned/scene/model","tokenizer_path":null,"resume_from_checkpoint":null,"attach_lora":false,"max_samples":0,"eval_ratio":0.0,"reshuffle":false,"dataloader_num_workers":1,"dataloader_pin_memory":false},"training":{"batch_size":2,"gradient_accumulation_steps":4,"max_seq_length":512,"learning_rate":0.0002,"optimizer":"adamw_torch","lr_scheduler_type":"cosine","num_train_epochs":2,"weight_decay":0.01,"warmup_ratio":0.1,"warmup_steps":0,"max_grad_norm":1.0,"max_steps":-1,"lr_num_cycles":2,"save_strategy":"steps","save_steps":100,"eval_strategy":"no","eval_steps":100,"save_total_limit":100,"save_interval_minutes":30,"early_stopping_patience":0,"early_stopping_threshold":0.005},"lora":{"use_lora":true,"lora_r":16,"lora_alpha":16,"lora_dropout":0.0,"lora_target_modules":["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"],"merge_lora":false,"peft_config_path":null},"optimization":{"use_qlora":false,"use_8bit_optimizer":false,"fp16":true,"bf16":false,"tf32":false,"gradient_checkpointing":true},"logging":{"log_level":"info","logging_steps":10},"general":{"seed":42}}','FINISHED','All epochs are done.',1795835468004450,1795835468029733,1795835468716745,'{"pid":21492,"start_time":226630.0,"boot_id":"00000000-0000-0000-0000-000000000000"}',0,'','{"step":4,"total_steps":4,"epoch":1.0,"tokens_per_second":0.0,"eta_seconds":null,"num_tokens":0,"loss":0.25,"learning_rate":null}','/data/finetuned/scene/out/run-1/checkpoint-4','/data/finetuned/state/runs/sft-00e5374341/1','/data/finetuned/scene/out/run-1',NULL,0,2125,16);
INSERT INTO "runs" VALUES(2,2,1,'FAILED','cpu','{"data":{"train_file":"/data/finetuned/scene/chats.jsonl","eval_file":null,"output_dir":"/data/finetuned/scene/out","model_path":"/data/finetuned/scene/model","tokenizer_path":null,"resume_from_checkpoint":null,"attach_lora":false,"max_samples":0,"eval_ratio":0.0,"reshuffle":false,"dataloader_num_workers":1,"dataloader_pin_memory":false},"training":{"batch_size":2,"gradient_accumulation_steps":4,"max_seq_length":512,"learning_rate":0.0002,"optimizer":"adamw_torch","lr_scheduler_type":"cosine","num_train_epochs":2,"weight_decay":0.01,"warmup_ratio":0.1,"warmup_steps":0,"max_grad_norm":1.0,"max_steps":-1,"lr_num_cycles":2,"save_strategy":"steps","save_steps":100,"eval_strategy":"no","eval_steps":100,"save_total_limit":100,"save_interval_minutes":30,"early_stopping_patience":0,"early_stopping_threshold":0.005},"lora":{"use_lora":true,"lora_r":16,"lora_alpha":16,"lora_dropout":0.0,"lora_target_modules":["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"],"merge_lora":false,"peft_config_path":null},"optimization":{"use_qlora":false,"use_8bit_optimizer":false,"fp16":true,"bf16":false,"tf32":false,"gradient_checkpointing":true},"logging":{"log_level":"info","logging_steps":10},"general":{"seed":42}}','RUNNER_CRASHED','The runner ended with exit status 1 and left no result; see its log. No checkpoint had been saved.',1795835468740891,1795835468742035,1795835469255390,'{"pid":21533,"start_time":226697.0,"boot_id":"00000000-0000-0000-0000-000000000000"}',1,'','{"step":2,"total_steps":3,"epoch":0.6666666666666666,"tokens_per_second":0.0,"eta_seconds":null,"num_tokens":0,"loss":0.5,"learning_rate":null}','','/data/finetuned/state/runs/sft-efb5b961ab/1','/data/finetuned/scene/out/run-2',NULL,0,1001,8);
INSERT INTO "runs" VALUES(3,3,1,'STOPPED','cpu','{"data":{"train_file":"/data/finetuned/scene/chats.jsonl","eval_file":null,"output_dir":"/data/finetuned/scene/out","model_path":"/data/finetuned/scene/model","tokenizer_path":null,"resume_from_checkpoint":null,"attach_lora":false,"max_samples":0,"eval_ratio":0.0,"reshuffle":false,"dataloader_num_workers":1,"dataloader_pin_memory":false},"training":{"batch_size":2,"gradient_accumulation_steps":4,"max_seq_length":512,"learning_rate":0.0002,"optimizer":"adamw_torch","lr_scheduler_type":"cosine","num_train_epochs":2,"weight_decay":0.01,"warmup_ratio":0.1,"warmup_steps":0,"max_grad_norm":1.0,"max_steps":-1,"lr_num_cycles":2,"save_strategy":"steps","save_steps":100,"eval_strategy":"no","eval_steps":100,"save_total_limit":100,"save_interval_minutes":30,"early_stopping_patience":0,"early_stopping_threshold":0.005},"lora":{"use_lora":true,"lora_r":16,"lora_alpha":16,"lora_dropout":0.0,"lora_target_modules":["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"],"merge_lora":false,"peft_config_path":null},"optimization":{"use_qlora":false,"use_8bit_optimizer":false,"fp16":true,"bf16":false,"tf32":false,"gradient_checkpointing":true},"logging":{"log_level":"info","logging_steps":10},"general":{"seed":42}}','STOPPED_BY_USER','Stopped on request.',1795835469269915,1795835469270864,1795835470039644,'{"pid":21546,"start_time":226750.0,"boot_id":"00000000-0000-0000-0000-000000000000"}',0,'','{"step":0,"total_steps":0,"epoch":0.0,"tokens_per_second":0.0,"eta_seconds":null,"num_tokens":0,"loss":null,"learning_rate":null}','','/data/finetuned/state/runs/sft-130f2d1d17/1','/data/finetuned/scene/out/run-2','SAVE',1795835469316150,332,3);
INSERT INTO "runs" VALUES(4,3,2,'COMPLETED','cpu','{"data":{"train_file":"/data/finetuned/scene/chats.jsonl","eval_file":null,"output_dir":"/data/finetuned/scene/out","model_path":"/data/finetuned/scene/model","tokenizer_path":null,"resume_from_checkpoint":null,"attach_lora":false,"max_samples":0,"eval_ratio":0.0,"reshuffle":false,"dataloader_num_workers":1,"dataloader_pin_memory":false},"training":{"batch_size":2,"gradient_accumulation_steps":4,"max_seq_length":512,"learning_rate":0.0002,"optimizer":"adamw_torch","lr_scheduler_type":"cosine","num_train_epochs":2,"weight_decay":0.01,"warmup_ratio":0.1,"warmup_steps":0,"max_grad_norm":1.0,"max_steps":-1,"lr_num_cycles":2,"save_strategy":"steps","save_steps":100,"eval_strategy":"no","eval_steps":100,"save_total_limit":100,"save_interval_minutes":30,"early_stopping_patience":0,"early_stopping_threshold":0.005},"lora":{"use_lora":true,"lora_r":16,"lora_alpha":16,"lora_dropout":0.0,"lora_target_modules":["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"],"merge_lora":false,"peft_config_path":null},"optimization":{"use_qlora":false,"use_8bit_optimizer":false,"fp16":true,"bf16":false,"tf32":false,"gradient_checkpointing":true},"logging":{"log_level":"info","logging_steps":10},"general":{"seed":42}}','FINISHED','All epochs are done.',1795835470050028,1795835470055413,1795835470824465,'{"pid":21608,"start_time":226831.0,"boot_id":"00000000-0000-0000-0000-000000000000"}',0,'','{"step":3,"total_steps":3,"epoch":1.0,"tokens_per_second":0.0,"eta_seconds":null,"num_tokens":0,"loss":0.3333333333333333,"learning_rate":null}','/data/finetuned/scene/out/run-3/checkpoint-3','/data/finetuned/state/runs/sft-130f2d1d17/2','/data/finetuned/scene/out/run-3',NULL,0,1578,12);
CREATE TABLE tasks (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    task_id TEXT NOT NULL UNIQUE,
    display_name TEXT NOT NULL UNIQUE,
    training_type TEXT NOT NULL,
    parameters TEXT NOT NULL,
    device TEXT NOT NULL,
    state TEXT NOT NULL,
    phase TEXT,
    end_reason TEXT,
    end_message TEXT NOT NULL,
    run INTEGER NOT NULL,
    progress TEXT NOT NULL,
    last_checkpoint TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    update_time INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    end_time INTEGER NOT NULL,
    last_seq INTEGER NOT NULL,
    revision INTEGER NOT NULL
);
INSERT INTO "tasks" VALUES(1,'sft-00e5374341','sft_20261128_031108','SFT','{"data":{"train_file":"/data/finetuned/scene/chats.jsonl","eval_file":null,"output_dir":"/data/finetuned/scene/out","model_path":"/data/finetuned/scene/model","tokenizer_path":null,"resume_from_checkpoint":null,"attach_lora":false,"max_samples":0,"eval_ratio":0.0,"reshuffle":false,"dataloader_num_workers":1,"dataloader_pin_memory":false},"training":{"batch_size":2,"gradient_accumulation_steps":4,"max_seq_length":512,"learning_rate":0.0002,"optimizer":"adamw_torch","lr_scheduler_type":"cosine","num_train_epochs":2,"weight_decay":0.01,"warmup_ratio":0.1,"warmup_steps":0,"max_grad_norm":1.0,"max_steps":-1,"lr_num_cycles":2,"save_strategy":"steps","save_steps":100,"eval_strategy":"no","eval_steps":100,"save_total_limit":100,"save_interval_minutes":30,"early_stopping_patience":0,"early_stopping_threshold":0.005},"lora":{"use_lora":true,"lora_r":16,"lora_alpha":16,"lora_dropout":0.0,"lora_target_modules":["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"],"merge_lora":false,"peft_config_path":null},"optimization":{"use_qlora":false,"use_8bit_optimizer":false,"fp16":true,"bf16":false,"tf32":false,"gradient_checkpointing":true},"logging":{"log_level":"info","logging_steps":10},"general":{"seed":42}}','cpu','COMPLETED',NULL,'FINISHED','All epochs are done.',1,'{"step":4,"total_steps":4,"epoch":1.0,"tokens_per_second":0.0,"eta_seconds":null,"num_tokens":0,"loss":0.25,"learning_rate":null}','/data/finetuned/scene/out/run-1/checkpoint-4',1795835468004331,1795835468717211,1795835468029733,1795835468716745,20,5);
INSERT INTO "tasks" VALUES(2,'sft-efb5b961ab','sft_20261128_031108_2','SFT','{"data":{"train_file":"/data/finetuned/scene/chats.jsonl","eval_file":null,"output_dir":"/data/finetuned/scene/out","model_path":"/data/finetuned/scene/model","tokenizer_path":null,"resume_from_checkpoint":null,"attach_lora":false,"max_samples":0,"eval_ratio":0.0,"reshuffle":false,"dataloader_num_workers":1,"dataloader_pin_memory":false},"training":{"batch_size":2,"gradient_accumulation_steps":4,"max_seq_length":512,"learning_rate":0.0002,"optimizer":"adamw_torch","lr_scheduler_type":"cosine","num_train_epochs":2,"weight_decay":0.01,"warmup_ratio":0.1,"warmup_steps":0,"max_grad_norm":1.0,"max_steps":-1,"lr_num_cycles":2,"save_strategy":"steps","save_steps":100,"eval_strategy":"no","eval_steps":100,"save_total_limit":100,"save_interval_minutes":30,"early_stopping_patience":0,"early_stopping_threshold":0.005},"lora":{"use_lora":true,"lora_r":16,"lora_alpha":16,"lora_dropout":0.0,"lora_target_modules":["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"],"merge_lora":false,"peft_config_path":null},"optimization":{"use_qlora":false,"use_8bit_optimizer":false,"fp16":true,"bf16":false,"tf32":false,"gradient_checkpointing":true},"logging":{"log_level":"info","logging_steps":10},"general":{"seed":42}}','cpu','FAILED',NULL,'RUNNER_CRASHED','The runner ended with exit status 1 and left no result; see its log. No checkpoint had been saved.',1,'{"step":2,"total_steps":3,"epoch":0.6666666666666666,"tokens_per_second":0.0,"eta_seconds":null,"num_tokens":0,"loss":0.5,"learning_rate":null}','',1795835468740797,1795835469255761,1795835468742035,1795835469255390,12,5);
INSERT INTO "tasks" VALUES(3,'sft-130f2d1d17','sft_20261128_031109','SFT','{"data":{"train_file":"/data/finetuned/scene/chats.jsonl","eval_file":null,"output_dir":"/data/finetuned/scene/out","model_path":"/data/finetuned/scene/model","tokenizer_path":null,"resume_from_checkpoint":null,"attach_lora":false,"max_samples":0,"eval_ratio":0.0,"reshuffle":false,"dataloader_num_workers":1,"dataloader_pin_memory":false},"training":{"batch_size":2,"gradient_accumulation_steps":4,"max_seq_length":512,"learning_rate":0.0002,"optimizer":"adamw_torch","lr_scheduler_type":"cosine","num_train_epochs":2,"weight_decay":0.01,"warmup_ratio":0.1,"warmup_steps":0,"max_grad_norm":1.0,"max_steps":-1,"lr_num_cycles":2,"save_strategy":"steps","save_steps":100,"eval_strategy":"no","eval_steps":100,"save_total_limit":100,"save_interval_minutes":30,"early_stopping_patience":0,"early_stopping_threshold":0.005},"lora":{"use_lora":true,"lora_r":16,"lora_alpha":16,"lora_dropout":0.0,"lora_target_modules":["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"],"merge_lora":false,"peft_config_path":null},"optimization":{"use_qlora":false,"use_8bit_optimizer":false,"fp16":true,"bf16":false,"tf32":false,"gradient_checkpointing":true},"logging":{"log_level":"info","logging_steps":10},"general":{"seed":42}}','cpu','COMPLETED',NULL,'FINISHED','All epochs are done.',2,'{"step":3,"total_steps":3,"epoch":1.0,"tokens_per_second":0.0,"eta_seconds":null,"num_tokens":0,"loss":0.3333333333333333,"learning_rate":null}','/data/finetuned/scene/out/run-3/checkpoint-3',1795835469269842,1795835470824874,1795835470055413,1795835470824465,24,10);
INSERT INTO "tasks" VALUES(4,'sft-15952c3f2d','sft_20261128_031110','SFT','{"data":{"train_file":"/data/finetuned/scene/chats.jsonl","eval_file":null,"output_dir":"/data/finetuned/scene/out","model_path":"/data/finetuned/scene/model","tokenizer_path":null,"resume_from_checkpoint":null,"attach_lora":false,"max_samples":0,"eval_ratio":0.0,"reshuffle":false,"dataloader_num_workers":1,"dataloader_pin_memory":false},"training":{"batch_size":2,"gradient_accumulation_steps":4,"max_seq_length":512,"learning_rate":0.0002,"optimizer":"adamw_torch","lr_scheduler_type":"cosine","num_train_epochs":2,"weight_decay":0.01,"warmup_ratio":0.1,"warmup_steps":0,"max_grad_norm":1.0,"max_steps":-1,"lr_num_cycles":2,"save_strategy":"steps","save_steps":100,"eval_strategy":"no","eval_steps":100,"save_total_limit":100,"save_interval_minutes":30,"early_stopping_patience":0,"early_stopping_threshold":0.005},"lora":{"use_lora":true,"lora_r":16,"lora_alpha":16,"lora_dropout":0.0,"lora_target_modules":["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"],"merge_lora":false,"peft_config_path":null},"optimization":{"use_qlora":false,"use_8bit_optimizer":false,"fp16":true,"bf16":false,"tf32":false,"gradient_checkpointing":true},"logging":{"log_level":"info","logging_steps":10},"general":{"seed":42}}','cpu','PENDING',NULL,NULL,'',0,'{"step":0,"total_steps":0,"epoch":0.0,"tokens_per_second":0.0,"eta_seconds":null,"num_tokens":0,"loss":null,"learning_rate":null}','',1795835470839232,1795835470839232,0,0,0,1);
CREATE INDEX tasks_by_state ON tasks (state, key);
CREATE INDEX runs_active ON runs (device, key) WHERE state IN ('QUEUED', 'RUNNING');
CREATE INDEX events_by_run ON events (task_key, run, seq);
CREATE INDEX requests_by_time ON requests (time);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('tasks',4);
INSERT INTO "sqlite_sequence" VALUES('runs',4);
PRAGMA user_version = 1;
COMMIT;
