-- Events of an existing task, in order; the first that is refused ends the call. KEYS[1] its snapshot.
-- ARGV: org, id, fence ('' when no worker speaks), operation ('' or a name under which the outcome is kept: 24 h, or a
-- minute if it begins with `once:`),
-- a set and the score in it that the caller saw (both '' without), submission (of a new turn, else ''); then per event
-- its producer number ('' without), type, event, rows.
-- Answers one reply per event that was looked at: {code, then where the task stands}. Codes: ok · duplicate · not_found
-- · stale · out_of_order · conflict · guarded · text_full · thread_full · sum_full.
local org, id, fence, operation = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local set, score, submission = ARGV[7], ARGV[8], ARGV[9]
local fields = load(org, id)
if not fields then return { { 'not_found', '0', '', '0', '', '0' } } end
local function reply(code)
  return { code, fields.last_seq, fields.last_event_id, '0', fields.status, fields.attempt }
end
-- Where the event with this producer number stands. A repeat follows closely, so only the last entries are looked at,
-- and once per call: the first repeat of a batch is its earliest.
local LOOK_ENTRIES, LOOK_BYTES = 1000, 8388608
local places
local function look(n)
  local stream, from, looked, bytes = key('events', org .. ':' .. id), '+', 0, 0
  while looked < LOOK_ENTRIES and bytes < LOOK_BYTES do
    local found = redis.call('XREVRANGE', stream, from, '-', 'COUNT', 20)
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
local function repeated(n)
  if not places then
    places = {}
    look(n)
  end
  local place = places[n] or { '0', '', '0' }
  return { 'duplicate', place[1], place[2], place[3], fields.status, fields.attempt }
end
local outcome = key('outcome', org .. ':' .. id .. ':' .. operation)
if operation ~= '' then
  local known = redis.call('GET', outcome)
  if known then
    local replies = cjson.decode(known)
    for _, one in ipairs(replies) do one[1] = 'duplicate' end
    return replies
  end
end

local function append(n, kind, event, rows)
  if submission ~= '' and submission == fields.submission then return reply('duplicate') end
  if fence ~= '' then
    if fence ~= fields.fence then return reply('stale') end
    if n ~= '' and tonumber(n) <= tonumber(fields.n or '0') then return repeated(n) end
    -- The fence rises only with the next start: between the end of an attempt and that, only the lease tells.
    if not redis.call('ZSCORE', key('leases'), org .. '/' .. id) then return reply('stale') end
    if n ~= '' and tonumber(n) > tonumber(fields.n or '0') + 1 then return reply('out_of_order') end
  end
  if set ~= '' and redis.call('ZSCORE', key(set), org .. '/' .. id) ~= score then return reply('stale') end
  local change = row(rows, fields.status)
  if not change then return reply('conflict') end
  local plan = { org = org, id = id, fields = fields, change = change, type = kind, event = event, n = n }
  local problem = prepare(plan)
  if problem then return reply(problem) end
  write(plan)
  return done(plan)
end

local replies = {}
for i = 10, #ARGV, 4 do
  if i > 10 then fields = load(org, id) end
  local one = append(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3])
  replies[#replies + 1] = one
  if one[1] ~= 'ok' and one[1] ~= 'duplicate' then return replies end
end
if operation ~= '' then
  local seconds = string.sub(operation, 1, 5) == 'once:' and 60 or 86400
  redis.call('SET', outcome, cjson.encode(replies), 'EX', seconds)
end
return replies
