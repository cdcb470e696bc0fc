"""The queue of training jobs, and what can be asked of one.

backlog    the one door to the queue: tenants submit and steer, workers claim and report
requests   what a tenant asks for, checked: a method, its `methods` parameters, run `settings`
lease      a worker's side of a claim

It imports neither torch nor the trainer, so that the server can check a job and keep the queue; a
job is carried out by a worker in another process.
"""
