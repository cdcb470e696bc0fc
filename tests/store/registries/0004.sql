BEGIN TRANSACTION;
CREATE TABLE adapters (
	id INTEGER NOT NULL, 
	tenant_id INTEGER NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	current_number INTEGER, 
	last_number INTEGER NOT NULL, 
	created_at DATETIME NOT NULL, 
	deleted_at DATETIME, 
	CONSTRAINT pk_adapters PRIMARY KEY (id), 
	CONSTRAINT fk_adapters_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id), 
	CONSTRAINT uq_adapters_tenant_id_name UNIQUE (tenant_id, name)
);
INSERT INTO "adapters" VALUES(1,1,'sql',2,2,'2030-01-01 00:00:00.000000',NULL);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0004');
CREATE TABLE api_keys (
	id VARCHAR(16) NOT NULL, 
	tenant_id INTEGER NOT NULL, 
	mac BLOB NOT NULL, 
	scope VARCHAR(16) NOT NULL, 
	label VARCHAR(128) NOT NULL, 
	created_at DATETIME NOT NULL, 
	expires_at DATETIME, 
	revoked_at DATETIME, 
	CONSTRAINT pk_api_keys PRIMARY KEY (id), 
	CONSTRAINT fk_api_keys_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
INSERT INTO "api_keys" VALUES('000000000001',1,X'229CE929A60A9CF488253BF1F421F2A9C7E0DEE4440D627D5E0084587B98B370','admin','','2030-01-01 00:00:00.000000',NULL,NULL);
INSERT INTO "api_keys" VALUES('000000000002',1,X'B6A30FAD557F04C2E9818A0209C353507D10E6DAD318BD665EC7595F80498082','user','','2030-01-01 00:00:00.000000',NULL,'2030-01-01 00:00:00.000000');
CREATE TABLE blobs (
	id VARCHAR(64) NOT NULL, 
	nbytes BIGINT NOT NULL, 
	created_at DATETIME NOT NULL, claims INTEGER DEFAULT '0' NOT NULL, moving BOOLEAN DEFAULT 0 NOT NULL, 
	CONSTRAINT pk_blobs PRIMARY KEY (id)
);
INSERT INTO "blobs" VALUES('0000000000000000000000000000000000000000000000000000000000000001',1001,'2030-01-01 00:00:00.000000',3,0);
INSERT INTO "blobs" VALUES('0000000000000000000000000000000000000000000000000000000000000002',1002,'2030-01-01 00:00:00.000000',0,0);
CREATE TABLE files (
	id INTEGER NOT NULL, 
	public_id VARCHAR(32) NOT NULL, 
	tenant_id INTEGER NOT NULL, 
	filename VARCHAR(255) NOT NULL, 
	purpose VARCHAR(32) NOT NULL, 
	blob_id VARCHAR(64) NOT NULL, 
	nbytes BIGINT NOT NULL, 
	created_at DATETIME NOT NULL, 
	deleted_at DATETIME, 
	CONSTRAINT pk_files PRIMARY KEY (id), 
	CONSTRAINT fk_files_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id), 
	CONSTRAINT uq_files_public_id UNIQUE (public_id)
);
INSERT INTO "files" VALUES(1,'file-000000000000000000000001',1,'1.jsonl','fine-tune','0000000000000000000000000000000000000000000000000000000000000003',1001,'2030-01-01 00:00:00.000000',NULL);
INSERT INTO "files" VALUES(2,'file-000000000000000000000002',1,'2.jsonl','fine-tune','0000000000000000000000000000000000000000000000000000000000000004',1002,'2030-01-01 00:00:00.000000','2030-01-01 00:00:00.000000');
CREATE TABLE identity (
	number INTEGER NOT NULL, 
	id VARCHAR(32) NOT NULL, 
	CONSTRAINT pk_identity PRIMARY KEY (number)
);
INSERT INTO "identity" VALUES(1,'00000000000000000000000000000042');
CREATE TABLE job_checkpoints (
	id INTEGER NOT NULL, 
	public_id VARCHAR(32) NOT NULL, 
	job_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	model VARCHAR(160) NOT NULL, 
	digest VARCHAR(80) NOT NULL, 
	metrics JSON NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_job_checkpoints PRIMARY KEY (id), 
	CONSTRAINT fk_job_checkpoints_job_id FOREIGN KEY(job_id) REFERENCES jobs (id), 
	CONSTRAINT uq_job_checkpoints_public_id UNIQUE (public_id), 
	CONSTRAINT uq_job_checkpoints_job_id_step UNIQUE (job_id, step)
);
INSERT INTO "job_checkpoints" VALUES(1,'ftckpt-000000000000000000000001',1,3,'sql@step-3','sha256:0000000000000000000000000000000000000000000000000000000000000011','{"train_loss": 0.5}','2030-01-01 00:00:00.000000');
CREATE TABLE job_events (
	job_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	"key" VARCHAR(64), 
	created_at DATETIME NOT NULL, 
	level VARCHAR(8) NOT NULL, 
	kind VARCHAR(8) NOT NULL, 
	message TEXT NOT NULL, 
	step INTEGER, 
	data JSON, 
	CONSTRAINT pk_job_events PRIMARY KEY (job_id, number), 
	CONSTRAINT fk_job_events_job_id FOREIGN KEY(job_id) REFERENCES jobs (id), 
	CONSTRAINT uq_job_events_job_id_key UNIQUE (job_id, "key")
);
INSERT INTO "job_events" VALUES(1,1,NULL,'2030-01-01 00:00:00.000000','info','message','The job is queued.',NULL,NULL);
INSERT INTO "job_events" VALUES(1,2,'step-3','2030-01-01 00:00:00.000000','info','metrics','step 3',3,'{"step": 3, "train_loss": 0.5}');
CREATE TABLE job_metadata (
	job_id INTEGER NOT NULL, 
	"key" VARCHAR(64) NOT NULL, 
	value VARCHAR(512) NOT NULL, 
	CONSTRAINT pk_job_metadata PRIMARY KEY (job_id, "key"), 
	CONSTRAINT fk_job_metadata_job_id FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "job_metadata" VALUES(1,'team','a');
CREATE TABLE jobs (
	id INTEGER NOT NULL, 
	public_id VARCHAR(32) NOT NULL, 
	tenant_id INTEGER NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	wanted VARCHAR(16), 
	request JSON NOT NULL, 
	request_digest VARCHAR(80) NOT NULL, 
	seed BIGINT NOT NULL, 
	adapter VARCHAR(128) NOT NULL, 
	base_fingerprint VARCHAR(80) NOT NULL, 
	training_file_id INTEGER NOT NULL, 
	validation_file_id INTEGER, 
	created_at DATETIME NOT NULL, 
	worker VARCHAR(128), 
	attempt INTEGER NOT NULL, 
	fence BIGINT NOT NULL, 
	claimed_at DATETIME, 
	heartbeat_at DATETIME, 
	lease_until DATETIME, 
	started_at DATETIME, 
	step INTEGER, 
	steps INTEGER, 
	loss DOUBLE, 
	trained_tokens BIGINT, 
	estimated_finish DATETIME, 
	last_event INTEGER NOT NULL, 
	kept_events INTEGER NOT NULL, 
	thinned_step INTEGER, 
	finished_at DATETIME, 
	error JSON, 
	version_label VARCHAR(160), 
	version_digest VARCHAR(80), 
	result_files JSON NOT NULL, 
	CONSTRAINT pk_jobs PRIMARY KEY (id), 
	CONSTRAINT fk_jobs_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id), 
	CONSTRAINT fk_jobs_training_file_id FOREIGN KEY(training_file_id) REFERENCES files (id), 
	CONSTRAINT fk_jobs_validation_file_id FOREIGN KEY(validation_file_id) REFERENCES files (id), 
	CONSTRAINT uq_jobs_public_id UNIQUE (public_id)
);
INSERT INTO "jobs" VALUES(1,'ftjob-000000000000000000000001',1,'running','pause','{"method": "sparta", "parameters": {"init_from": null, "density": 0.005, "of": "model", "targets": "v,o", "mask_seed": null}, "settings": {"epochs": 1.0}, "training_file": "file-000000000000000000000002", "validation_file": null, "model": "base", "base_fingerprint": "sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff", "references": {}, "suffix": "sql", "seed": 1, "metadata": {"team": "a"}}','sha256:0000000000000000000000000000000000000000000000000000000000000001',1,'sql','sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff',2,NULL,'2030-01-01 00:00:00.000000','w1',2,2,'2030-01-01 00:00:00.000000','2030-01-01 00:00:00.000000','2030-01-01 00:00:00.000000','2030-01-01 00:00:00.000000',3,10,0.5,700,'2030-01-01 00:00:00.000000',2,2,NULL,NULL,NULL,NULL,NULL,'[]');
INSERT INTO "jobs" VALUES(2,'ftjob-000000000000000000000002',1,'succeeded',NULL,'{"method": "sparta", "parameters": {"init_from": null, "density": 0.005, "of": "model", "targets": "v,o", "mask_seed": null}, "settings": {"epochs": 1.0}, "training_file": "file-000000000000000000000002", "validation_file": null, "model": "base", "base_fingerprint": "sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff", "references": {}, "suffix": "sql", "seed": 1, "metadata": {"team": "a"}}','sha256:0000000000000000000000000000000000000000000000000000000000000002',1,'sql','sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff',2,NULL,'2030-01-01 00:00:00.000000',NULL,1,1,'2030-01-01 00:00:00.000000',NULL,NULL,'2030-01-01 00:00:00.000000',10,10,NULL,NULL,NULL,0,0,NULL,'2030-01-01 00:00:00.000000',NULL,'sql:2','sha256:0000000000000000000000000000000000000000000000000000000000000012','["file-000000000000000000000001"]');
CREATE TABLE tenants (
	id INTEGER NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_tenants PRIMARY KEY (id), 
	CONSTRAINT uq_tenants_name UNIQUE (name)
);
INSERT INTO "tenants" VALUES(1,'acme','2030-01-01 00:00:00.000000');
INSERT INTO "tenants" VALUES(2,'zeta','2030-01-01 00:00:00.000000');
CREATE TABLE uploads (
	id VARCHAR(32) NOT NULL, 
	blob_id VARCHAR(64) NOT NULL, 
	started_at DATETIME NOT NULL, 
	CONSTRAINT pk_uploads PRIMARY KEY (id), 
	CONSTRAINT fk_uploads_blob_id FOREIGN KEY(blob_id) REFERENCES blobs (id)
);
CREATE TABLE versions (
	id INTEGER NOT NULL, 
	adapter_id INTEGER NOT NULL, 
	number INTEGER, 
	tag VARCHAR(32), 
	digest VARCHAR(80) NOT NULL, 
	blob_id VARCHAR(64) NOT NULL, 
	nbytes BIGINT NOT NULL, 
	nnz BIGINT NOT NULL, 
	density DOUBLE NOT NULL, 
	modules JSON NOT NULL, 
	record JSON NOT NULL, 
	warnings JSON NOT NULL, 
	base_fingerprint VARCHAR(80) NOT NULL, 
	base_verified BOOLEAN NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	created_at DATETIME NOT NULL, 
	deleted_at DATETIME, 
	CONSTRAINT pk_versions PRIMARY KEY (id), 
	CONSTRAINT fk_versions_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (id), 
	CONSTRAINT uq_versions_adapter_id_number UNIQUE (adapter_id, number)
);
INSERT INTO "versions" VALUES(1,1,1,NULL,'sha256:0000000000000000000000000000000000000000000000000000000000000011','0000000000000000000000000000000000000000000000000000000000000001',1001,400,0.078125,'[]','{"seed": 1}','[]','sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff',1,'active','2030-01-01 00:00:00.000000',NULL);
INSERT INTO "versions" VALUES(2,1,2,NULL,'sha256:0000000000000000000000000000000000000000000000000000000000000012','0000000000000000000000000000000000000000000000000000000000000002',1002,400,0.078125,'[]','{"seed": 1}','[]','sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff',1,'active','2030-01-01 00:00:00.000000',NULL);
CREATE INDEX ix_api_keys_tenant_id ON api_keys (tenant_id);
CREATE INDEX ix_uploads_blob_id ON uploads (blob_id);
CREATE INDEX ix_versions_adapter_id_tag ON versions (adapter_id, tag);
CREATE INDEX ix_versions_blob_id ON versions (blob_id);
CREATE INDEX ix_versions_digest ON versions (digest);
CREATE INDEX ix_files_tenant_id ON files (tenant_id);
CREATE INDEX ix_files_blob_id ON files (blob_id);
CREATE INDEX ix_jobs_status ON jobs (status);
CREATE INDEX ix_jobs_tenant_id_request_digest ON jobs (tenant_id, request_digest);
CREATE INDEX ix_jobs_training_file_id ON jobs (training_file_id);
CREATE INDEX ix_jobs_validation_file_id ON jobs (validation_file_id);
COMMIT;
