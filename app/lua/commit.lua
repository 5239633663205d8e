-- What scripts share: it stands before each of them that is not self-contained (`app/connect.py` joins the files).
--
-- Lua does not roll back: `prepare` checks everything and calls TYPE on every key that will be written, so that
-- during a slot migration the script stops before its first write; `write` then cannot fail.
-- No rule about statuses stands here: `app/task.py` sends the rows.
--
-- ARGV[1] key prefix of the partition, ARGV[2] limits: events and bytes per mark, log entries, bytes per log mark.

local PREFIX = ARGV[1]
local EVENTS_PER_MARK, BYTES_PER_MARK, LOG_ENTRIES, LOG_BYTES_PER_MARK =
  string.match(ARGV[2], '(%d+) (%d+) (%d+) (%d+)')
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

local NOTHING = {}

-- Lua prints large numbers as 1.7e+15; ids and scores need every digit.
local function digits(number) return string.format('%d', number) end

local function key(kind, rest)
  if rest then return PREFIX .. kind .. ':' .. rest end
  return PREFIX .. kind
end

local LOG, MARKS, COUNT = key('log'), key('marks'), key('count')
local LEASES, DUE, ENDED = key('leases'), key('due'), key('ended')

-- Seconds and µs, read once: all that one call writes happens at one time.
local clock
local function time()
  clock = clock or redis.call('TIME')
  return clock[1], clock[2]
end

-- The store's time in µs: never before the log's last id, wherever the clock of this server stands, so that what an
-- entry's time made ready, leased or due is so at once.
local function now_us()
  local seconds, micros = time()
  local us = tonumber(seconds) * 1000000 + tonumber(micros)
  local last = redis.call('XREVRANGE', LOG, '+', '-', 'COUNT', 1)[1]
  local ms = last and tonumber(string.match(last[1], '^(%d+)')) or 0
  return math.max(us, ms * 1000)
end

-- What most steps look at; a snapshot has more.
local NAMES = { 'status', 'last_seq', 'size', 'fence', 'attempt', 'n', 'owner', 'user', 'agent', 'session', 'queue',
  'created_at', 'deadline_at', 'expires_at', 'internal_status', 'text_agent', 'waits', 'thread_size' }

-- Those fields of a snapshot, false where it has none; nil when there is no such task.
local function load(org, id)
  local v = redis.call('HMGET', key('task', org .. ':' .. id), unpack(NAMES))
  if not v[1] then return nil end
  -- Made at once: a table that grows field by field is moved at each power of two.
  return { status = v[1], last_seq = v[2], size = v[3], fence = v[4], attempt = v[5], n = v[6], owner = v[7],
    user = v[8], agent = v[9], session = v[10], queue = v[11], created_at = v[12], deadline_at = v[13],
    expires_at = v[14], internal_status = v[15], text_agent = v[16], waits = v[17], thread_size = v[18] }
end

-- Others of its fields, in their order, false where it has none.
local function more(org, id, ...) return unpack(redis.call('HMGET', key('task', org .. ':' .. id), ...)) end

-- The row for this status, from [[[statuses…], change]…]; nil: the table refuses.
local decoded = {}
local function row(rows, status)
  decoded[rows] = decoded[rows] or cjson.decode(rows)
  for _, pair in ipairs(decoded[rows]) do
    for _, legal in ipairs(pair[1]) do
      if legal == status then return pair[2] end
    end
  end
  return nil
end

-- The lists below `base` (of all tasks, or of those in one status) that a task stands in together with many others.
local function indexes_of(fields, base)
  local owner = fields.owner or ''
  local names = { key('index', base), key('index', base .. ':owner:' .. owner) }
  for _, kind in ipairs({ 'agent', 'user' }) do
    if fields[kind] then names[#names + 1] = key('index', base .. ':' .. kind .. ':' .. fields[kind]) end
  end
  return names
end

-- And that of its session, which often is its own. A session is its owner's: two users may use one session id.
local function session_index_of(fields, base)
  return key('index', base .. ':session:' .. (fields.owner or '') .. ':' .. fields.session)
end

local function family_indexes_of(fields, org)
  local names = {}
  for _, kind in ipairs({ 'parent', 'trigger' }) do
    if fields[kind] then names[#names + 1] = key('index', org .. ':' .. kind .. ':' .. fields[kind]) end
  end
  return names
end

local function in_status(org, status) return org .. ':status:' .. status end

local function waiting_indexes_of(fields, org)
  return { key('index', org .. ':waiting'), key('index', org .. ':waiting:owner:' .. (fields.owner or '')) }
end

local function internal_index_of(org, value) return key('index', org .. ':internal:' .. value) end

-- Each key once per call.
local touched = {}
local function touch(kind, name)
  if touched[name] then return end
  local found = redis.call('TYPE', name).ok
  if found ~= kind and found ~= 'none' then error({ err = 'WRONGTYPE ' .. name .. ' is a ' .. found }) end
  touched[name] = true
end

-- Sorted sets, all in one call, for each call costs more than what it does: the intersection with a set that never is
-- looks at the type of each key, and at no member.
local function touch_sets(names)
  local fresh = {}
  for _, name in ipairs(names) do
    if not touched[name] then fresh[#fresh + 1] = name end
  end
  if #fresh == 0 then return end
  redis.call('ZINTERCARD', #fresh + 1, key('none'), unpack(fresh))
  for _, name in ipairs(fresh) do touched[name] = true end
end

-- What this call owes to sorted sets and to the partition's counters: paid at its end, and before it looks at a task
-- again, in one command per list and kin however many tasks it is about.
local OWED_MAX = 1000 -- writes; Lua passes at most 8,000 words to a command
local owed, entries, entry_bytes
local function owe_nothing() owed = { add = {}, remove = {}, moves = {}, count = {}, tasks = {}, writes = 0 } end
owe_nothing()

local function pay()
  for name, members in pairs(owed.add) do redis.call('ZADD', name, unpack(members)) end
  for name, members in pairs(owed.remove) do redis.call('ZREM', name, unpack(members)) end
  for move in pairs(owed.moves) do
    for _, name in ipairs(move.join) do redis.call('ZADD', name, unpack(move.scored)) end
    for _, name in ipairs(move.leave) do redis.call('ZREM', name, unpack(move.ids)) end
    move.scored, move.ids = {}, {}
  end
  if entries then redis.call('HSET', COUNT, 'n', digits(entries), 'bytes', digits(entry_bytes)) end
  for name, count in pairs(owed.count) do redis.call('HINCRBY', COUNT, name, count) end
  owe_nothing()
end

local function add(plan, name, score, member)
  local members = owed.add[name] or {}
  owed.add[name], owed.tasks[plan.member] = members, true
  local size = #members
  members[size + 1], members[size + 2] = score, member
end

local function remove(plan, name, member)
  local members = owed.remove[name] or {}
  owed.remove[name], owed.tasks[plan.member] = members, true
  members[#members + 1] = member
end

local function count(name, by) owed.count[name] = (owed.count[name] or 0) + by end

-- As JSON.
local function quoted(text)
  return string.find(text, '[%c"\\]') and cjson.encode(text) or '"' .. text .. '"'
end

-- What tasks of the same owner, user, agent and queue have in common: made once per call.
local kins = {}
local function kin_of(org, f)
  local owner, user, agent, queue = f.owner or '', f.user or '', f.agent or '', f.queue or ''
  local sign = org .. '\0' .. owner .. '\0' .. user .. '\0' .. agent .. '\0' .. queue
  local kin = kins[sign]
  -- Names may hold what parts them.
  if not kin or kin.user ~= user or kin.agent ~= agent then
    kin = {
      user = user, agent = agent, moves = {},
      ready = key('ready', queue), ready_of = key('ready-of', org .. ':' .. queue), wake = key('wake', queue),
      org = ',' .. quoted(org) .. ',', queue = ',' .. quoted(queue) .. ']',
      head = ',' .. quoted(owner) .. ',' .. quoted(user) .. ',' .. quoted(agent) .. ',',
    }
    kins[sign] = kin
  end
  return kin
end

-- Of a kin's tasks from one status to another: the lists that they leave and join.
local function move_of(kin, org, fields, from, to)
  local name = from .. '>' .. to
  local move = kin.moves[name]
  if not move then
    move = { join = indexes_of(fields, in_status(org, to)), leave = {}, scored = {}, ids = {} }
    if from == 'new' then
      for _, list in ipairs(indexes_of(fields, org)) do move.join[#move.join + 1] = list end
    else
      move.leave = indexes_of(fields, in_status(org, from))
    end
    touch_sets(move.join)
    touch_sets(move.leave)
    kin.moves[name] = move
  end
  return move
end

-- When the ticker has to look at the task: the earlier of its two deadlines, or nil.
local function due_of(fields)
  local deadline, expiry = tonumber(fields.deadline_at), tonumber(fields.expires_at)
  if deadline and expiry then return math.min(deadline, expiry) end
  return deadline or expiry
end

-- Before its first mark a task has no `next`.
local function prepare_mark(plan, task)
  plan.next, plan.next_text = key('next', task), key('next-text', task)
  plan.base, plan.base_text = key('base', task), key('base-text', task)
  plan.text = key('text', task)
  plan.mark = redis.call('HMGET', plan.next, 'last_seq', 'size', 'last_event_id')
  local marked_seq, marked_size = tonumber(plan.mark[1] or '0'), tonumber(plan.mark[2] or '0')
  plan.marks = plan.seq - marked_seq >= EVENTS_PER_MARK or plan.size - marked_size >= BYTES_PER_MARK
  if plan.marks then
    touch('string', plan.text)
    touch('string', plan.next_text)
    touch('hash', plan.base)
    touch('string', plan.base_text)
  end
end

-- The lists that hold few tasks.
local function prepare_lists(plan)
  local org, before, after, join, leave = plan.org, plan.fields, plan.after, {}, {}
  if plan.new then join = family_indexes_of(after, org) end
  if plan.move and after.session then
    join[#join + 1] = session_index_of(after, in_status(org, after.status))
    if plan.new then
      join[#join + 1] = session_index_of(after, org)
    else
      leave[1] = session_index_of(before, in_status(org, before.status))
    end
  end
  if after.internal_status ~= before.internal_status then
    if after.internal_status then join[#join + 1] = internal_index_of(org, after.internal_status) end
    if before.internal_status then leave[#leave + 1] = internal_index_of(org, before.internal_status) end
  end
  if after.waits ~= before.waits then
    if not before.waits then
      for _, name in ipairs(waiting_indexes_of(after, org)) do join[#join + 1] = name end
    elseif not after.waits then
      for _, name in ipairs(waiting_indexes_of(before, org)) do leave[#leave + 1] = name end
    end
  end
  touch_sets(join)
  touch_sets(leave)
  plan.join, plan.leave = join, leave
end

-- plan: org, id, fields (before; {} for a new task), change, sets (what it sets besides: name and value in turn), type,
-- event (JSON), n ('' when no worker spoke), lease (ms, of a claim). Adds everything that `write` needs. Returns an
-- error code, or nil.
local function prepare(plan)
  local org, id, change, before, sets = plan.org, plan.id, plan.change, plan.fields, plan.sets
  local task = org .. ':' .. id
  plan.task, plan.events = key('task', task), key('events', task)
  plan.member = org .. '/' .. id
  plan.new = before.created_at == nil

  for name, value in pairs(change.guard or NOTHING) do
    if (more(org, id, name) or '') ~= value then return 'guarded' end
  end
  local after, rises = before, change.add
  if change.status or change.set or change.clear or rises or #sets > 0 then
    -- What differs stands before what was.
    after = setmetatable({ status = change.status or before.status }, { __index = before })
    for _, name in ipairs(change.clear or NOTHING) do after[name] = false end
    for name, value in pairs(change.set or NOTHING) do after[name] = value end
    for i = 1, #sets, 2 do after[sets[i]] = sets[i + 1] end
    if plan.new or rises then
      after.fence = digits(tonumber(after.fence or '0') + (rises and rises.fence or 0))
      after.attempt = digits(tonumber(after.attempt or '0') + (rises and rises.attempt or 0))
    end
  end
  plan.after, plan.kin = after, kin_of(org, after)
  plan.seq = tonumber(before.last_seq or '0') + 1
  plan.size = tonumber(before.size or '0') + #plan.event

  -- Not the counters, which are read before the first write, nor the snapshot, which was.
  touch('stream', LOG)
  touch('list', MARKS)
  touch('stream', plan.events)
  if change.text then
    plan.text = key('text', task)
    touch('string', plan.text)
  end
  if change.thread then
    plan.thread = key('thread', task)
    touch('list', plan.thread)
    plan.thread_size = tonumber(before.thread_size or '0') + #plan.event
    if change.thread == 'bounded'
      and (plan.thread_size > THREAD_BYTES or redis.call('LLEN', plan.thread) >= THREAD_MESSAGES) then
      return 'thread_full'
    end
  end
  if plan.seq >= EVENTS_PER_MARK or plan.size >= BYTES_PER_MARK then prepare_mark(plan, task) end

  if after.status ~= before.status then
    plan.move = move_of(plan.kin, org, after, before.status or 'new', after.status)
  end
  if plan.new or (plan.move and after.session) or after.internal_status ~= before.internal_status
    or after.waits ~= before.waits then
    prepare_lists(plan)
  end
  local lists = {}
  plan.enters = after.queue ~= before.queue
  if plan.enters then lists[#lists + 1] = key('queues') end
  if plan.new and after.session then lists[#lists + 1] = key('sessions', org .. ':' .. (after.owner or '')) end
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
    lists[#lists + 1] = plan.kin.ready
    lists[#lists + 1] = plan.kin.ready_of
    if change.ready == 'add' then touch('list', plan.kin.wake) end
  end
  if change.lease or plan.lease then lists[#lists + 1] = LEASES end
  if change.due then lists[#lists + 1] = DUE end
  if change.follow and (change.follow == 'id' or more(org, id, change.follow)) then
    plan.followup = key('followups')
    touch('list', plan.followup)
  end
  if change.ended then lists[#lists + 1] = ENDED end
  touch_sets(lists)

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
    plan.after.text_agent = agent
    set('text_agent', agent)
  elseif how == 'clear' then
    redis.call('DEL', plan.text)
    redis.call('HDEL', plan.task, 'text_agent')
    plan.after.text_agent = false
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
      plan.after.text_agent = last
      set('text_agent', last)
    else
      redis.call('DEL', plan.text)
      redis.call('HDEL', plan.task, 'text_agent')
      plan.after.text_agent = false
    end
  end
end

-- Appends to the partition's log, counts that, and returns the id that it gives, and the time in µs.
local next_mark
local function log_entry(plan, before, after)
  local f, kin, seconds, micros = plan.after, plan.kin, time()
  if not entries then
    local counted = redis.call('HMGET', COUNT, 'n', 'bytes')
    entries, entry_bytes = tonumber(counted[1] or '0'), tonumber(counted[2] or '0')
    next_mark = (math.floor(entry_bytes / LOG_BYTES_PER_MARK) + 1) * LOG_BYTES_PER_MARK
  end
  entries = entries + 1
  -- One text: readers look at the header of every entry, and seventeen fields would cost them more than all the rest.
  local head = '[' .. digits(entries) .. kin.org .. quoted(plan.id) .. kin.head
    .. (f.session and quoted(f.session) or '""') .. ',"' .. before .. '","' .. after .. '",'
    .. plan.seq_text .. ',' .. seconds .. ',' .. micros .. ',"' .. plan.type .. '",' .. f.fence .. ','
    .. f.attempt .. ',' .. (plan.n == '' and '0' or plan.n) .. kin.queue
  local id = redis.call('XADD', LOG, 'MAXLEN', '=', LOG_ENTRIES, '*', 'head', head, 'event', plan.event)
  -- One mark per so many bytes; with the 65th the oldest share goes.
  entry_bytes = entry_bytes + #plan.event + #head + 200
  if entry_bytes >= next_mark then
    next_mark = (math.floor(entry_bytes / LOG_BYTES_PER_MARK) + 1) * LOG_BYTES_PER_MARK
    if redis.call('RPUSH', MARKS, id) > LOG_MARKS then
      redis.call('XTRIM', LOG, 'MINID', '=', redis.call('LPOP', MARKS))
    end
  end
  local at = math.max(tonumber(seconds) * 1000000 + tonumber(micros), tonumber(string.match(id, '^%d+')) * 1000)
  count('event:' .. plan.type, 1)
  if plan.enters then
    local first = redis.call('ZADD', key('queues'), digits(at), f.queue) == 1
    if first then redis.call('ZREMRANGEBYRANK', key('queues'), 0, -QUEUES - 1) end
  end
  return id, at
end

local function follow_up(plan)
  redis.call('RPUSH', plan.followup, plan.member .. '/' .. plan.seq_text .. ' ' .. plan.event)
end

local function write_ready(plan, at)
  local priority, ready_at = plan.after.priority, plan.after.ready_at
  if not plan.new then priority, ready_at = more(plan.org, plan.id, 'priority', 'ready_at') end
  local when = ready_at or digits(at - (HEAD_START[priority] or 0))
  add(plan, plan.kin.ready, when, plan.member)
  add(plan, plan.kin.ready_of, when, plan.member)
  if redis.call('LLEN', plan.kin.wake) < WAKE_TOKENS then
    -- Of a queue that nobody serves nothing shall stay.
    if redis.call('RPUSH', plan.kin.wake, '1') == 1 then redis.call('EXPIRE', plan.kin.wake, WAKE_SECONDS) end
  end
end

-- Whoever has written pays at the end.
local function write(plan)
  owed.writes = owed.writes + 1
  if owed.writes > OWED_MAX then pay() end
  local change, before, after = plan.change, plan.fields, plan.after
  local status = before.status or 'new'
  plan.seq_text = digits(plan.seq)
  local id, at = log_entry(plan, status, after.status)
  local stamp, seq = digits(at), plan.seq_text
  plan.entry_id, plan.stamp = id, stamp
  redis.call('XADD', plan.events, id, 'seq', seq, 'at', stamp, 'type', plan.type, 'fence', after.fence, 'attempt',
    after.attempt, 'worker-n', plan.n, 'event', plan.event)

  local fields = { 'last_seq', seq, 'last_event_id', id, 'updated_at', stamp, 'size', digits(plan.size),
    unpack(plan.sets) }
  local size = #fields
  local function set(name, value)
    fields[size + 1], fields[size + 2] = name, value
    size = size + 2
  end
  local gone = {}
  for _, name in ipairs(change.clear or NOTHING) do
    if before[name] ~= false then gone[#gone + 1] = name end -- false: known to be absent
  end
  if #gone > 0 then redis.call('HDEL', plan.task, unpack(gone)) end
  for name, value in pairs(change.set or NOTHING) do set(name, value) end
  for _, name in ipairs(change.stamp or NOTHING) do set(name, stamp) end
  for name, micros in pairs(change.later or NOTHING) do
    after[name] = digits(at + micros)
    set(name, after[name])
  end
  if after ~= before then
    if after.status ~= status then set('status', after.status) end
    if plan.new or after.fence ~= before.fence then set('fence', after.fence) end
    if plan.new or after.attempt ~= before.attempt then set('attempt', after.attempt) end
  end
  if plan.n ~= '' then
    after.n = plan.n
    set('n', plan.n)
  end
  for _, name in ipairs(change.number or NOTHING) do set(name, seq) end
  if change.thread then
    redis.call('RPUSH', plan.thread, seq .. ' ' .. stamp .. ' ' .. plan.event)
    after.thread_size = digits(plan.thread_size)
    set('thread_size', after.thread_size)
  end
  if change.text then write_text(plan, set) end
  redis.call('HSET', plan.task, unpack(fields))
  after.last_seq, after.size = seq, fields[8]
  for name, value in pairs(change.fill or NOTHING) do redis.call('HSETNX', plan.task, name, value) end
  for name, sum in pairs(change.add or NOTHING) do
    if name ~= 'fence' and name ~= 'attempt' then redis.call('HINCRBY', plan.task, name, digits(sum)) end
  end
  for name, sum in pairs(change.spend or NOTHING) do
    redis.call('HINCRBY', plan.task, name, digits(sum))
    if plan.totals then redis.call('HINCRBY', plan.totals, name, digits(sum)) end
  end

  local score = plan.new and stamp or before.created_at
  if plan.move then
    local scored, ids = plan.move.scored, plan.move.ids
    ids[#ids + 1] = plan.id
    scored[2 * #ids - 1], scored[2 * #ids] = score, plan.id
    owed.moves[plan.move], owed.tasks[plan.member] = true, true
  end
  for _, name in ipairs(plan.leave or NOTHING) do remove(plan, name, plan.id) end
  for _, name in ipairs(plan.join or NOTHING) do add(plan, name, score, plan.id) end
  if plan.new then
    count('tasks', 1)
    if after.session then
      redis.call('ZADD', key('sessions', plan.org .. ':' .. (after.owner or '')), 'NX', stamp, after.session)
    end
  end
  if change.ready == 'add' then
    write_ready(plan, at)
  elseif change.ready == 'remove' then
    remove(plan, plan.kin.ready, plan.member)
    remove(plan, plan.kin.ready_of, plan.member)
  end
  if plan.lease then
    add(plan, LEASES, digits(math.floor(at / 1000) + plan.lease), plan.member)
  elseif change.lease == 'remove' then
    remove(plan, LEASES, plan.member)
  end
  if change.due then
    local due = change.due == 'set' and due_of(after)
    if due then
      add(plan, DUE, digits(math.floor(due / 1000)), plan.member)
    elseif due_of(before) then
      remove(plan, DUE, plan.member)
    end
  end
  if plan.followup then follow_up(plan) end

  if change.ended == 'add' then
    add(plan, ENDED, stamp, plan.member)
    count('ended:' .. after.status, 1)
  elseif change.ended == 'remove' then
    remove(plan, ENDED, plan.member)
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

-- The answers of a step for each task of this call: so many words of ARGV, a number, and as many words as that says.
-- One task's damaged keys must not stop the others, some of which have been written.
local function each(step, words)
  local answers, at = {}, 3
  while at <= #ARGV do
    local fine, answer = pcall(step, at)
    answers[#answers + 1] = fine and answer or { err = type(answer) == 'table' and answer.err or tostring(answer) }
    at = at + words + 1 + tonumber(ARGV[at + words])
  end
  pay()
  return answers
end

-- So many words, as they are counted there.
local function words_at(at)
  local size = tonumber(ARGV[at])
  return size > 0 and { unpack(ARGV, at + 1, at + size) } or NOTHING
end

local function done(plan)
  return { 'ok', plan.seq_text, plan.entry_id, plan.stamp, plan.after.status, plan.after.attempt }
end
