-- What scripts share: it stands before each of them that is not self-contained (`app/connect.py` joins the files).
--
-- Lua does not roll back: `prepare` checks everything and calls TYPE on every key that will be written, so that
-- during a slot migration the script stops before its first write; `write` then cannot fail.
-- No rule about statuses stands here: `app/task.py` sends the rows.
--
-- ARGV[1] key prefix of the partition, ARGV[2] limits: events and bytes per mark, log entries, bytes per log mark.

local PREFIX = ARGV[1]
local EVENTS_PER_MARK, BYTES_PER_MARK, LOG_ENTRIES, LOG_BYTES_PER_MARK = string.match(ARGV[2], '(%d+) (%d+) (%d+) (%d+)')
EVENTS_PER_MARK, BYTES_PER_MARK = tonumber(EVENTS_PER_MARK), tonumber(BYTES_PER_MARK)
LOG_BYTES_PER_MARK = tonumber(LOG_BYTES_PER_MARK)
local LOG_MARKS = 64
local TEXT_BYTES = 196608
local THREAD_BYTES = 8388608
local THREAD_MESSAGES = 10000
local WAKE_TOKENS = 64
local WAKE_SECONDS = 3600
local QUEUES = 200
-- The largest whole number that Lua holds exactly.
local SUM_MAX = 9007199254740991
-- Priorities 0, 1, 2 count as if the task had waited so many µs longer.
local HEAD_START = { ['1'] = 60000000, ['2'] = 600000000 }

-- Lua prints large numbers as 1.7e+15; ids and scores need every digit.
local function digits(number) return string.format('%.0f', number) end

local function key(kind, rest)
  if rest then return PREFIX .. kind .. ':' .. rest end
  return PREFIX .. kind
end

-- The store's time in µs: never before the log's last id, wherever the clock of this server stands, so that what an
-- entry's time made ready, leased or due is so at once.
local function now_us()
  local now = redis.call('TIME')
  local us = tonumber(now[1]) * 1000000 + tonumber(now[2])
  local last = redis.call('XREVRANGE', key('log'), '+', '-', 'COUNT', 1)[1]
  local ms = last and tonumber(string.match(last[1], '^(%d+)')) or 0
  return math.max(us, ms * 1000)
end

local NAMES = { 'status', 'last_seq', 'size', 'fence', 'attempt', 'n', 'owner', 'user', 'agent', 'session', 'parent',
  'trigger', 'queue', 'priority', 'created_at', 'ready_at', 'deadline_at', 'internal_status', 'text_agent',
  'submission', 'body_hash', 'id', 'last_event_id', 'max_attempts', 'refunds', 'expires_at', 'waits', 'children',
  'review_round', 'review_version', 'stated_version', 'thread_size' }

-- The fields of a snapshot that scripts look at; nil when there is no such task.
local function load(org, id)
  local values = redis.call('HMGET', key('task', org .. ':' .. id), unpack(NAMES))
  if not values[1] then return nil end
  local fields = {}
  for i, name in ipairs(NAMES) do fields[name] = values[i] or nil end
  return fields
end

-- The row for this status, from [[[statuses…], change]…], as text or decoded; nil: the table refuses.
local function row(rows, status)
  for _, pair in ipairs(type(rows) == 'table' and rows or cjson.decode(rows)) do
    for _, legal in ipairs(pair[1]) do
      if legal == status then return pair[2] end
    end
  end
  return nil
end

-- The lists that a task stands in: below `base` as a whole, and by each of `kinds` that it has a value for.
-- A session is its owner's: two users may use one session id.
local function indexes_of(fields, base, kinds)
  local owner = fields.owner or ''
  local names = { key('index', base), key('index', base .. ':owner:' .. owner) }
  for _, kind in ipairs(kinds) do
    local value = fields[kind]
    if value and kind == 'session' then value = owner .. ':' .. value end
    if value then names[#names + 1] = key('index', base .. ':' .. kind .. ':' .. value) end
  end
  return names
end

local function task_indexes_of(fields, org)
  return indexes_of(fields, org, { 'agent', 'user', 'session', 'parent', 'trigger' })
end

local function status_indexes_of(fields, org, status)
  return indexes_of(fields, org .. ':status:' .. status, { 'agent', 'user', 'session' })
end

local function waiting_indexes_of(fields, org) return indexes_of(fields, org .. ':waiting', {}) end

local function internal_index_of(org, value) return key('index', org .. ':internal:' .. value) end

local function touch(kind, name)
  local found = redis.call('TYPE', name).ok
  if found ~= kind and found ~= 'none' then error({ err = 'WRONGTYPE ' .. name .. ' is a ' .. found }) end
end

-- Sorted sets, all in one call, for each call costs more than what it does: the intersection with a set that never is
-- looks at the type of each key, and at no member.
local function touch_sets(names)
  redis.call('ZINTERCARD', #names + 1, key('none'), unpack(names))
end

-- When the ticker has to look at the task: the earlier of its two deadlines, or nil.
local function due_of(fields)
  local deadline, expiry = tonumber(fields.deadline_at), tonumber(fields.expires_at)
  if deadline and expiry then return math.min(deadline, expiry) end
  return deadline or expiry
end

-- plan: org, id, fields (before; {} for a new task), change, type, event (JSON), n ('' when no worker spoke),
-- lease (ms, of a claim). Adds everything that `write` needs. Returns an error code, or nil.
local function prepare(plan)
  local org, id, change, before = plan.org, plan.id, plan.change, plan.fields
  local task = org .. ':' .. id
  plan.task, plan.events, plan.text = key('task', task), key('events', task), key('text', task)
  plan.next, plan.base = key('next', task), key('base', task)
  plan.next_text, plan.base_text = key('next-text', task), key('base-text', task)
  plan.thread = key('thread', task)
  plan.member = org .. '/' .. id

  for name, value in pairs(change.guard or {}) do
    if (before[name] or '') ~= value then return 'guarded' end
  end
  local after = {}
  for name, value in pairs(before) do after[name] = value end
  for _, name in ipairs(change.clear or {}) do after[name] = nil end
  for name, value in pairs(change.set or {}) do after[name] = value end
  for name, value in pairs(change.fill or {}) do after[name] = after[name] or value end
  after.status = change.status or before.status
  local add = change.add or {}
  after.fence = digits(tonumber(after.fence or '0') + (add.fence or 0))
  after.attempt = digits(tonumber(after.attempt or '0') + (add.attempt or 0))
  plan.after = after
  plan.seq = tonumber(before.last_seq or '0') + 1
  plan.size = tonumber(before.size or '0') + #plan.event
  plan.new = before.created_at == nil
  plan.moved = after.status ~= before.status
  plan.mark = redis.call('HMGET', plan.next, 'last_seq', 'size', 'last_event_id')

  -- Not the counters, which take the first write of all, nor the snapshot, which was read.
  touch('stream', key('log'))
  touch('list', key('marks'))
  touch('stream', plan.events)
  if change.text then touch('string', plan.text) end
  if change.thread then
    touch('list', plan.thread)
    plan.thread_size = tonumber(before.thread_size or '0') + #plan.event
    if change.thread == 'bounded'
      and (plan.thread_size > THREAD_BYTES or redis.call('LLEN', plan.thread) >= THREAD_MESSAGES) then
      return 'thread_full'
    end
  end
  local marked_seq, marked_size = tonumber(plan.mark[1] or '0'), tonumber(plan.mark[2] or '0')
  plan.marks = plan.seq - marked_seq >= EVENTS_PER_MARK or plan.size - marked_size >= BYTES_PER_MARK
  if plan.marks then
    touch('string', plan.next_text)
    touch('hash', plan.base)
    touch('string', plan.base_text)
  end
  plan.join, plan.leave = {}, {}
  if plan.new then
    plan.join = task_indexes_of(after, org)
  end
  if plan.moved then
    for _, name in ipairs(status_indexes_of(after, org, after.status)) do plan.join[#plan.join + 1] = name end
    if not plan.new then plan.leave = status_indexes_of(before, org, before.status) end
  end
  if after.internal_status ~= before.internal_status then
    if after.internal_status then plan.join[#plan.join + 1] = internal_index_of(org, after.internal_status) end
    if before.internal_status then plan.leave[#plan.leave + 1] = internal_index_of(org, before.internal_status) end
  end
  if after.waits ~= before.waits then
    if not before.waits then
      for _, name in ipairs(waiting_indexes_of(after, org)) do plan.join[#plan.join + 1] = name end
    elseif not after.waits then
      for _, name in ipairs(waiting_indexes_of(before, org)) do plan.leave[#plan.leave + 1] = name end
    end
  end
  local sets = { unpack(plan.join) }
  for _, name in ipairs(plan.leave) do sets[#sets + 1] = name end
  plan.enters = after.queue ~= before.queue
  if plan.enters then sets[#sets + 1] = key('queues') end
  if plan.new and after.session then sets[#sets + 1] = key('sessions', org .. ':' .. (after.owner or '')) end
  if change.spend then
    if after.session then
      plan.totals = key('totals', org .. ':' .. (after.owner or '') .. ':' .. after.session)
      touch('hash', plan.totals)
    end
    for name, count in pairs(change.spend) do
      for _, sums in ipairs({ plan.task, plan.totals }) do
        if tonumber(redis.call('HGET', sums, name) or '0') + count > SUM_MAX then return 'sum_full' end
      end
    end
  end
  if change.ready then
    sets[#sets + 1] = key('ready', after.queue)
    sets[#sets + 1] = key('ready-of', org .. ':' .. after.queue)
    if change.ready == 'add' then touch('list', key('wake', after.queue)) end
  end
  if change.lease or plan.lease then sets[#sets + 1] = key('leases') end
  if change.due then sets[#sets + 1] = key('due') end
  if change.follow and after[change.follow] then
    plan.followup = key('followups')
    touch('list', plan.followup)
  end
  if change.ended then sets[#sets + 1] = key('ended') end
  if #sets > 0 then touch_sets(sets) end

  if change.text == 'append' then
    plan.delta = cjson.decode(plan.event)
    local room = TEXT_BYTES - redis.call('STRLEN', plan.text)
    if #plan.delta.text + #(plan.delta.agent or '') + 2 > room then return 'text_full' end
  end
  return nil
end

local function write_text(plan, set)
  local how = plan.change.text
  if how == 'append' then
    local agent = plan.delta.agent or ''
    local frame = ''
    if plan.fields.text_agent ~= agent then frame = '\255' .. agent .. '\254' end
    redis.call('APPEND', plan.text, frame .. plan.delta.text)
    set('text_agent', agent)
  elseif how == 'clear' then
    redis.call('DEL', plan.text)
    redis.call('HDEL', plan.task, 'text_agent')
  elseif how == 'drop' and plan.fields.text_agent then
    local agent = cjson.decode(plan.event).agent or ''
    local kept, last = {}, nil
    for frame in string.gmatch(redis.call('GET', plan.text), '\255[^\255]*') do
      local whose = string.match(frame, '^\255([^\254]*)\254')
      if whose ~= agent then
        kept[#kept + 1] = frame
        last = whose
      end
    end
    if last then
      redis.call('SET', plan.text, table.concat(kept))
      set('text_agent', last)
    else
      redis.call('DEL', plan.text)
      redis.call('HDEL', plan.task, 'text_agent')
    end
  end
end

-- Appends to the partition's log, counts that, and returns the id that it gives, and the time in µs.
local function log_entry(plan, before, after)
  local now = redis.call('TIME')
  local number = redis.call('HINCRBY', key('count'), 'n', 1)
  local f = plan.after
  -- One text: readers look at the header of every entry, and seventeen fields would cost them more than all the rest.
  local head = cjson.encode({ number, plan.org, plan.id, f.owner or '', f.user or '', f.agent or '', f.session or '',
    before, after, plan.seq, tonumber(now[1]), tonumber(now[2]), plan.type, tonumber(f.fence), tonumber(f.attempt),
    tonumber(plan.n) or 0, f.queue or '' })
  local id = redis.call('XADD', key('log'), 'MAXLEN', '=', LOG_ENTRIES, '*', 'head', head, 'event', plan.event)
  -- One mark per so many bytes; with the 65th the oldest share goes.
  local size = #plan.event + #head + 200
  local bytes = redis.call('HINCRBY', key('count'), 'bytes', size)
  if math.floor(bytes / LOG_BYTES_PER_MARK) ~= math.floor((bytes - size) / LOG_BYTES_PER_MARK) then
    if redis.call('RPUSH', key('marks'), id) > LOG_MARKS then
      redis.call('XTRIM', key('log'), 'MINID', '=', redis.call('LPOP', key('marks')))
    end
  end
  local ms = tonumber(string.match(id, '^(%d+)'))
  local at = tonumber(now[1]) * 1000000 + tonumber(now[2])
  if at < ms * 1000 then at = ms * 1000 end
  redis.call('HINCRBY', key('count'), 'event:' .. plan.type, 1)
  if plan.enters then
    local first = redis.call('ZADD', key('queues'), digits(at), f.queue) == 1
    if first then redis.call('ZREMRANGEBYRANK', key('queues'), 0, -QUEUES - 1) end
  end
  return id, at
end

local function follow_up(plan)
  if plan.followup then
    redis.call('RPUSH', plan.followup, plan.member .. '/' .. digits(plan.seq) .. ' ' .. plan.event)
  end
end

local function write(plan)
  local change, after = plan.change, plan.after
  local id, at = log_entry(plan, plan.fields.status or 'new', after.status)
  plan.entry_id, plan.at = id, at
  local stamp = digits(at)
  redis.call('XADD', plan.events, id, 'seq', digits(plan.seq), 'at', stamp, 'type', plan.type, 'fence', after.fence,
    'attempt', after.attempt, 'worker-n', plan.n, 'event', plan.event)

  local pairs_ = {}
  local function set(name, value)
    pairs_[#pairs_ + 1] = name
    pairs_[#pairs_ + 1] = value
  end
  if change.clear and #change.clear > 0 then redis.call('HDEL', plan.task, unpack(change.clear)) end
  for name, value in pairs(change.set or {}) do set(name, value) end
  for name in pairs(change.fill or {}) do set(name, after[name]) end
  for _, name in ipairs(change.stamp or {}) do set(name, stamp) end
  for name, micros in pairs(change.later or {}) do
    after[name] = digits(at + micros)
    set(name, after[name])
  end
  set('status', after.status)
  set('last_seq', digits(plan.seq))
  set('last_event_id', id)
  set('updated_at', stamp)
  set('size', digits(plan.size))
  set('fence', after.fence)
  set('attempt', after.attempt)
  if plan.n ~= '' then set('n', plan.n) end
  for _, name in ipairs(change.number or {}) do set(name, digits(plan.seq)) end
  if change.thread then
    redis.call('RPUSH', plan.thread, digits(plan.seq) .. ' ' .. stamp .. ' ' .. plan.event)
    set('thread_size', digits(plan.thread_size))
  end
  write_text(plan, set)
  redis.call('HSET', plan.task, unpack(pairs_))
  for name, count in pairs(change.add or {}) do
    if name ~= 'fence' and name ~= 'attempt' then redis.call('HINCRBY', plan.task, name, digits(count)) end
  end
  for name, count in pairs(change.spend or {}) do
    redis.call('HINCRBY', plan.task, name, digits(count))
    if plan.totals then redis.call('HINCRBY', plan.totals, name, digits(count)) end
  end

  local score = plan.new and stamp or plan.fields.created_at
  for _, name in ipairs(plan.leave) do redis.call('ZREM', name, plan.id) end
  for _, name in ipairs(plan.join) do redis.call('ZADD', name, score, plan.id) end
  if plan.new then redis.call('HINCRBY', key('count'), 'tasks', 1) end
  if plan.new and after.session then
    redis.call('ZADD', key('sessions', plan.org .. ':' .. (after.owner or '')), 'NX', stamp, after.session)
  end
  if change.ready == 'add' then
    local when = at - (HEAD_START[after.priority] or 0)
    if after.ready_at then when = tonumber(after.ready_at) end
    redis.call('ZADD', key('ready', after.queue), digits(when), plan.member)
    redis.call('ZADD', key('ready-of', plan.org .. ':' .. after.queue), digits(when), plan.member)
    local tokens = redis.call('RPUSH', key('wake', after.queue), '1')
    -- Of a queue that nobody serves nothing shall stay.
    if tokens == 1 then redis.call('EXPIRE', key('wake', after.queue), WAKE_SECONDS) end
    if tokens > WAKE_TOKENS then redis.call('LTRIM', key('wake', after.queue), -WAKE_TOKENS, -1) end
  elseif change.ready == 'remove' then
    redis.call('ZREM', key('ready', after.queue), plan.member)
    redis.call('ZREM', key('ready-of', plan.org .. ':' .. after.queue), plan.member)
  end
  if plan.lease then
    redis.call('ZADD', key('leases'), digits(math.floor(at / 1000) + plan.lease), plan.member)
  elseif change.lease == 'remove' then
    redis.call('ZREM', key('leases'), plan.member)
  end
  local due = change.due == 'set' and due_of(after)
  if due then
    redis.call('ZADD', key('due'), digits(math.floor(due / 1000)), plan.member)
  elseif change.due and due_of(plan.fields) then
    redis.call('ZREM', key('due'), plan.member)
  end
  follow_up(plan)

  if change.ended == 'add' then
    local ends = redis.call('ZADD', key('ended'), stamp, plan.member) == 1 -- else it had ended before
    if ends then redis.call('HINCRBY', key('count'), 'ended:' .. after.status, 1) end
  elseif change.ended == 'remove' then
    redis.call('ZREM', key('ended'), plan.member)
  end

  -- Trimming: every mark copies the snapshot to `next`; the following mark cuts the stream there and keeps that
  -- copy as `base`. So fold(base, entries) is the snapshot at any time.
  if plan.marks then
    if plan.mark[1] then
      local ms, n = string.match(plan.mark[3], '^(%d+)-(%d+)$')
      redis.call('XTRIM', plan.events, 'MINID', '=', ms .. '-' .. digits(tonumber(n) + 1))
      redis.call('RENAME', plan.next, plan.base)
      if redis.call('EXISTS', plan.next_text) == 1 then
        redis.call('RENAME', plan.next_text, plan.base_text)
      else
        redis.call('DEL', plan.base_text)
      end
    end
    redis.call('COPY', plan.task, plan.next)
    redis.call('DEL', plan.next_text)
    if redis.call('EXISTS', plan.text) == 1 then redis.call('COPY', plan.text, plan.next_text) end
  end
end

local function done(plan)
  return { 'ok', digits(plan.seq), plan.entry_id, digits(plan.at), plan.after.status, plan.after.attempt }
end
