-- Tasks for a worker: pops at most `free` of those that are ready, starts each and leases it, in one step.
-- KEYS[1] the partition's lease set. ARGV: claim id, free slots, lease (ms), organisation ('' for all), then per queue
-- its name, event (`started`), rows. Answers a list of {org, id, fence, snapshot as a JSON array: name, value, …}.
-- The same claim id again answers with the same tasks; fences tell whether they are still this worker's.
local claim, free, lease, only = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local kept = key('claim', claim)
local known = redis.call('GET', kept)
local function answer(claimed)
  for _, one in ipairs(claimed) do
    -- As one text: each word of an answer costs as much as a command.
    local snapshot = redis.call('HGETALL', key('task', one[1] .. ':' .. one[2]))
    one[4] = #snapshot > 0 and cjson.encode(snapshot) or '[]'
  end
  return claimed
end
if known then return answer(cjson.decode(known)) end

-- Those that are past a deadline are the ticker's: after a night without any process, workers may come before it.
local LOOK_MAX = 1000
local waiting, seen, now = {}, {}, now_us()
local function look(queue, at)
  local found, from, size = 0, 0, math.min(free, LOOK_MAX)
  while found < free and from < LOOK_MAX do
    local page = redis.call('ZRANGEBYSCORE', queue, '-inf', digits(now), 'WITHSCORES', 'LIMIT', from, size)
    if #page == 0 then return end
    local members = {}
    for j = 1, #page, 2 do members[#members + 1] = page[j] end
    local dues = redis.call('ZMSCORE', DUE, unpack(members))
    for j = 1, #page, 2 do
      local due = dues[(j + 1) / 2]
      if not seen[page[j]] and not (due and tonumber(due) * 1000 <= now) then
        seen[page[j]] = true
        found = found + 1
        waiting[#waiting + 1] = { member = page[j], score = tonumber(page[j + 1]), at = at }
      end
    end
    from, size = from + size, 100
  end
end
for i = 7, #ARGV, 3 do
  look(only == '' and key('ready', ARGV[i]) or key('ready-of', only .. ':' .. ARGV[i]), i)
end
-- One queue's are in order.
if #ARGV > 9 then
  table.sort(waiting, function(a, b)
    if a.score ~= b.score then return a.score < b.score end
    return a.member < b.member
  end)
end

local plans, strays = {}, {}
for i = 1, math.min(free, #waiting) do
  local one = waiting[i]
  local org, id = string.match(one.member, '^([^/]*)/(.*)$')
  local fields = org and load(org, id)
  local change = fields and row(ARGV[one.at + 2], fields.status)
  if change then
    local plan = {
      org = org, id = id, fields = fields, change = change, sets = NOTHING, type = 'started', event = ARGV[one.at + 1],
      n = '', lease = lease,
    }
    prepare(plan)
    plans[#plans + 1] = plan
  else
    strays[#strays + 1] = one
  end
end
-- Not ours, or damaged by hand: left in the queue they would stop every claim.
for _, one in ipairs(strays) do
  redis.call('ZREM', key('ready', ARGV[one.at]), one.member)
  local org = string.match(one.member, '^([^/]*)/')
  if org then redis.call('ZREM', key('ready-of', org .. ':' .. ARGV[one.at]), one.member) end
end
local claimed = {}
for i, plan in ipairs(plans) do
  write(plan)
  claimed[i] = { plan.org, plan.id, plan.after.fence }
end
pay()
if #claimed > 0 then redis.call('SET', kept, cjson.encode(claimed), 'EX', 60) end
return answer(claimed)
