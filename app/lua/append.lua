-- Events of existing tasks. KEYS[i] the snapshot of the i-th task.
-- ARGV per task: org, id, fence ('' when no worker speaks), operation ('' or a name under which the outcome is kept:
-- 24 h, or a minute if it begins with `once:`), a set and the score in it that the caller saw (both '' without),
-- submission (of a new turn, else ''), number of words that follow: per event its producer number ('' without), type,
-- event, rows, number of words of what it sets, and those: name and value in turn. A task's events are taken in order;
-- the first that is refused ends them, and the next task's turn comes.
-- Answers per task an error, or one reply per event that was looked at: {code, then where the task stands}. Codes:
-- ok · duplicate · not_found · stale · out_of_order · conflict · guarded · text_full · thread_full · sum_full.

-- Where the event with this producer number stands. A repeat follows closely, so only the last entries are looked at.
local LOOK_ENTRIES, LOOK_BYTES = 1000, 8388608
local function look(task, fence, n, places)
  local from, looked, bytes = '+', 0, 0
  while looked < LOOK_ENTRIES and bytes < LOOK_BYTES do
    local found = redis.call('XREVRANGE', key('events', task), from, '-', 'COUNT', 20)
    if #found == 0 then return end
    for _, entry in ipairs(found) do
      local said = {}
      for i = 1, #entry[2], 2 do said[entry[2][i]] = entry[2][i + 1] end
      if said.fence == fence and said['worker-n'] ~= '' then
        places[said['worker-n']] = { said.seq, entry[1], said.at }
        if said['worker-n'] == n then return end
      end
      bytes = bytes + #said.event
    end
    looked, from = looked + #found, '(' .. found[#found][1]
  end
end

local function append(at)
  local org, id, fence, operation = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local set, score, submission, stop = ARGV[at + 4], ARGV[at + 5], ARGV[at + 6], at + 8 + tonumber(ARGV[at + 7])
  local task, member = org .. ':' .. id, org .. '/' .. id
  local fields = load(org, id)
  if not fields then return { { 'not_found', '0', '', '0', '', '0' } } end
  local function reply(code)
    return { code, fields.last_seq, more(org, id, 'last_event_id'), '0', fields.status, fields.attempt }
  end
  local places -- looked for once: the first repeat of a batch is its earliest
  local function repeated(n)
    if not places then
      places = {}
      look(task, fence, n, places)
    end
    local place = places[n] or { '0', '', '0' }
    return { 'duplicate', place[1], place[2], place[3], fields.status, fields.attempt }
  end
  local outcome = key('outcome', task .. ':' .. operation)
  if operation ~= '' then
    local known = redis.call('GET', outcome)
    if known then
      local replies = cjson.decode(known)
      for _, one in ipairs(replies) do one[1] = 'duplicate' end
      return replies
    end
  end

  local function step(n, kind, event, rows, sets)
    if submission ~= '' and submission == more(org, id, 'submission') then return reply('duplicate') end
    if fence ~= '' then
      if fence ~= fields.fence then return reply('stale') end
      if n ~= '' and tonumber(n) <= tonumber(fields.n or '0') then return repeated(n) end
      -- The fence rises only with the next start: between the end of an attempt and that, only the lease tells.
      if not redis.call('ZSCORE', LEASES, member) then return reply('stale') end
      if n ~= '' and tonumber(n) > tonumber(fields.n or '0') + 1 then return reply('out_of_order') end
    end
    if set ~= '' and redis.call('ZSCORE', key(set), member) ~= score then return reply('stale') end
    local change = row(rows, fields.status)
    if not change then return reply('conflict') end
    local plan = {
      org = org, id = id, fields = fields, change = change, sets = sets, type = kind, event = event, n = n,
    }
    local problem = prepare(plan)
    if problem then return reply(problem) end
    write(plan)
    if plan.after ~= fields then fields = nil end
    return done(plan)
  end

  local replies, from = {}, at + 8
  while from < stop do
    if owed.tasks[member] then pay() end
    fields = fields or load(org, id)
    local sets = words_at(from + 4)
    local one = step(ARGV[from], ARGV[from + 1], ARGV[from + 2], ARGV[from + 3], sets)
    replies[#replies + 1] = one
    if one[1] ~= 'ok' and one[1] ~= 'duplicate' then return replies end
    from = from + 5 + tonumber(ARGV[from + 4])
  end
  if operation ~= '' then
    local seconds = string.sub(operation, 1, 5) == 'once:' and 60 or 86400
    redis.call('SET', outcome, cjson.encode(replies), 'EX', seconds)
  end
  return replies
end

return each(append, 7)
