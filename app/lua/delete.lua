-- Removes a task: appends `deleted` to the partition's log, then removes everything of it. KEYS[1] its snapshot.
-- ARGV: org, id, event, rows, and the score in `ended` that the caller saw ('' without). Answers as append.lua.
-- A tombstone keeps seq and fence 24 h for a reused id, and the submission, of which a late repeat makes no new task.
local org, id = ARGV[3], ARGV[4]
local fields = load(org, id)
if not fields then return { 'not_found', '0', '', '0', '', '0' } end
local submission
fields.parent, fields.trigger, submission = more(org, id, 'parent', 'trigger', 'submission')
if ARGV[7] ~= '' and redis.call('ZSCORE', key('ended'), org .. '/' .. id) ~= ARGV[7] then
  return { 'stale', fields.last_seq, more(org, id, 'last_event_id'), '0', fields.status, fields.attempt }
end
local plan = {
  org = org, id = id, fields = fields, change = row(ARGV[6], fields.status), sets = NOTHING, type = 'deleted',
  event = ARGV[5], n = '',
}
prepare(plan)
local spent = redis.call('HMGET', plan.task, 'input_tokens', 'output_tokens', 'cost_nano')
local grave = key('tombstone', org .. ':' .. id)
local lists, sets = {}, { key('leases'), key('due'), key('ended') }
for _, names in ipairs({
  indexes_of(fields, org),
  indexes_of(fields, in_status(org, fields.status)),
  family_indexes_of(fields, org),
  fields.session and { session_index_of(fields, org), session_index_of(fields, in_status(org, fields.status)) } or {},
  fields.waits and waiting_indexes_of(fields, org) or {},
  fields.internal_status and { internal_index_of(org, fields.internal_status) } or {},
}) do
  for _, name in ipairs(names) do lists[#lists + 1] = name end
end
sets[#sets + 1] = key('ready', fields.queue)
sets[#sets + 1] = key('ready-of', org .. ':' .. fields.queue)
touch_sets(lists)
touch_sets(sets)
touch('hash', grave)
local rest = { [key('secrets', org .. ':' .. id .. ':' .. (submission or ''))] = 'string' }
for kind, type in pairs({
  text = 'string', next = 'hash', ['next-text'] = 'string', base = 'hash', ['base-text'] = 'string', thread = 'list',
}) do rest[key(kind, org .. ':' .. id)] = type end
for name, type in pairs(rest) do touch(type, name) end
if fields.session then
  touch('zset', key('sessions', org .. ':' .. (fields.owner or '')))
  touch('hash', key('totals', org .. ':' .. (fields.owner or '') .. ':' .. fields.session))
end

plan.seq_text = digits(plan.seq)
local at
plan.entry_id, at = log_entry(plan, fields.status, 'gone')
plan.stamp = digits(at)
redis.call('DEL', plan.task, plan.events)
for name in pairs(rest) do redis.call('DEL', name) end
if plan.followup then follow_up(plan) end
redis.call('HSET', grave, 'last_seq', plan.seq_text, 'fence', fields.fence, 'created_at', fields.created_at,
  'submission', submission or '')
redis.call('EXPIRE', grave, 86400)
for _, name in ipairs(lists) do redis.call('ZREM', name, id) end
for _, name in ipairs(sets) do redis.call('ZREM', name, plan.member) end
count('tasks', -1)
pay()
if fields.session then
  local owner = fields.owner or ''
  local totals = key('totals', org .. ':' .. owner .. ':' .. fields.session)
  if redis.call('EXISTS', key('index', org .. ':session:' .. owner .. ':' .. fields.session)) == 0 then
    redis.call('DEL', totals)
    redis.call('ZREM', key('sessions', org .. ':' .. owner), fields.session)
  else
    for i, name in ipairs({ 'input_tokens', 'output_tokens', 'cost_nano' }) do
      if spent[i] and redis.call('HINCRBY', totals, name, '-' .. spent[i]) == 0 then
        redis.call('HDEL', totals, name)
      end
    end
    -- The session begins with the oldest task that it still has.
    local sessions = key('sessions', org .. ':' .. owner)
    local began = redis.call('ZSCORE', sessions, fields.session)
    if began then
      local index = key('index', org .. ':session:' .. owner .. ':' .. fields.session)
      local first = redis.call('ZRANGEBYSCORE', index, began, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
      if first[1] then
        redis.call('ZADD', sessions, first[2], fields.session)
      else
        redis.call('ZREM', sessions, fields.session)
      end
    end
  end
end
return done(plan)
